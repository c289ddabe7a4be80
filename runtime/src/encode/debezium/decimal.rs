//! Decimals as Connect carries them: the unscaled number in two's complement, big-endian, beside its scale.

use super::value::Unfit;

/// The unscaled number of a decimal that has `scale` digits after the point.
///
/// # Errors
/// For NaN and the infinities, which have no form, and for what is not such a number.
pub(super) fn with_scale(text: &str, scale: i32) -> Result<Vec<u8>, Unfit> {
    let number = Number::parse(text)?;
    let (whole, fraction) = (number.whole, number.fraction);
    let places = scale.unsigned_abs() as usize;
    if scale < 0 {
        let kept = whole.len().saturating_sub(places);
        if !all_zero(&whole[kept..]) || !all_zero(fraction) {
            return Err(Unfit::Malformed);
        }
        return Ok(unscaled(&whole[..kept], "", 0, number.negative));
    }
    let (kept, cut) = fraction.split_at(places.min(fraction.len()));
    if !all_zero(cut) {
        return Err(Unfit::Malformed);
    }
    Ok(unscaled(whole, kept, places - kept.len(), number.negative))
}

/// The unscaled number and the scale, which is the least that holds the number, and not negative.
///
/// # Errors
/// As [`with_scale`].
pub(super) fn with_own_scale(text: &str) -> Result<(Vec<u8>, usize), Unfit> {
    let number = Number::parse(text)?;
    let fraction = number.fraction.trim_end_matches('0');
    Ok((unscaled(number.whole, fraction, 0, number.negative), fraction.len()))
}

struct Number<'a> {
    negative: bool,
    whole: &'a str,
    fraction: &'a str,
}

impl<'a> Number<'a> {
    fn parse(text: &'a str) -> Result<Self, Unfit> {
        if matches!(text, "NaN" | "Infinity" | "-Infinity") {
            return Err(Unfit::NoForm);
        }
        let (negative, digits) = match text.strip_prefix('-') {
            Some(digits) => (true, digits),
            None => (false, text),
        };
        let (whole, fraction) = digits.split_once('.').unwrap_or((digits, ""));
        let is_number = |part: &str| part.bytes().all(|byte| byte.is_ascii_digit());
        if whole.is_empty() || !is_number(whole) || !is_number(fraction) {
            return Err(Unfit::Malformed);
        }
        Ok(Self {
            negative,
            whole,
            fraction,
        })
    }
}

fn all_zero(digits: &str) -> bool {
    digits.bytes().all(|digit| digit == b'0')
}

/// Digits per step: 10 to the 18th is the largest power of ten in 64 bits but for one, which leaves room for the carry.
const STEP: usize = 18;

fn unscaled(whole: &str, fraction: &str, zeros: usize, negative: bool) -> Vec<u8> {
    let digits = || {
        whole
            .bytes()
            .chain(fraction.bytes())
            .chain(std::iter::repeat_n(b'0', zeros))
    };
    let count = whole.len() + fraction.len() + zeros;
    // The magnitude in 64-bit limbs, the least first.
    let mut limbs: Vec<u64> = Vec::with_capacity(count / STEP + 1);
    let mut digits = digits();
    let mut left = count;
    while left > 0 {
        // The first step takes what is over, so that all others are full.
        let take = match left % STEP {
            0 => STEP,
            over => over,
        };
        let mut carry = 0_u64;
        for digit in digits.by_ref().take(take) {
            carry = carry * 10 + u64::from(digit - b'0');
        }
        let factor = 10_u64.pow(u32::try_from(take).unwrap_or(0));
        for limb in &mut limbs {
            let product = u128::from(*limb) * u128::from(factor) + u128::from(carry);
            let [low, high] = [product as u64, (product >> 64) as u64];
            *limb = low;
            carry = high;
        }
        if carry > 0 {
            limbs.push(carry);
        }
        left -= take;
    }
    let mut bytes: Vec<u8> = std::iter::once(0)
        .chain(limbs.iter().rev().flat_map(|limb| limb.to_be_bytes()))
        .collect();
    if negative {
        let mut carry = true;
        for byte in bytes.iter_mut().rev() {
            let (sum, overflow) = (!*byte).overflowing_add(u8::from(carry));
            *byte = sum;
            carry = overflow;
        }
    }
    // Bytes that only repeat the sign say nothing.
    let sign = |byte: u8| byte & 0x80;
    let start = bytes
        .windows(2)
        .position(|pair| !(matches!(pair[0], 0 | 0xFF) && sign(pair[0]) == sign(pair[1])))
        .unwrap_or(bytes.len() - 1);
    bytes.split_off(start)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn decimals_are_the_bytes_of_the_unscaled_number() {
        assert_eq!(with_scale("1.10", 2), Ok(vec![110]));
        assert_eq!(with_scale("1.1", 3), Ok(vec![4, 76]));
        assert_eq!(with_scale("-1.28", 2), Ok(vec![128]));
        assert_eq!(with_scale("1.28", 2), Ok(vec![0, 128]));
        assert_eq!(with_scale("0", 2), Ok(vec![0]));
        assert_eq!(with_scale("-0.00", 2), Ok(vec![0]));
        assert_eq!(with_scale("12300", -2), Ok(vec![123]));
        assert_eq!(with_scale("0", -2), Ok(vec![0]));
        assert_eq!(with_own_scale("10.1100"), Ok((vec![3, 243], 2)));
        assert_eq!(with_own_scale("100"), Ok((vec![100], 0)));
        assert_eq!(with_own_scale("0.000"), Ok((vec![0], 0)));
    }

    #[test]
    fn what_is_no_finite_number_has_no_form_and_what_is_no_number_is_refused() {
        for text in ["NaN", "Infinity", "-Infinity"] {
            assert_eq!(with_scale(text, 2), Err(Unfit::NoForm));
        }
        for text in ["", "-", "1e5", "1,0", "x", "1.2.3"] {
            assert_eq!(with_own_scale(text), Err(Unfit::Malformed), "{text}");
        }
        assert_eq!(with_scale("1.234", 2), Err(Unfit::Malformed));
    }

    proptest! {
        #[test]
        fn every_number_reads_back_from_its_bytes(number in any::<i128>()) {
            let bytes = with_scale(&number.to_string(), 0).unwrap();
            let mut whole = [if bytes[0] & 0x80 == 0 { 0 } else { 0xFF }; 16];
            whole[16 - bytes.len()..].copy_from_slice(&bytes);
            prop_assert_eq!(i128::from_be_bytes(whole), number);
            let redundant = bytes.len() > 1 && matches!(bytes[0], 0 | 0xFF) && (bytes[0] ^ bytes[1]) & 0x80 == 0;
            prop_assert!(!redundant);
        }

        #[test]
        fn a_number_of_any_length_keeps_every_digit(digits in "[1-9][0-9]{0,400}", zeros in 0_usize..40) {
            // Ten times the number is the number with a zero behind it: the same bytes by two ways.
            let padded = format!("{digits}{}", "0".repeat(zeros));
            prop_assert_eq!(with_scale(&digits, i32::try_from(zeros).unwrap()), with_scale(&padded, 0));
        }
    }
}
