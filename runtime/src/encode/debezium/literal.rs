//! PostgreSQL's own notations for values made of values: arrays and hstore.

use std::borrow::Cow;

use super::value::Unfit;

/// Calls `take` for each element of an array of one dimension; none stands for NULL. Bounds are passed over.
///
/// # Errors
/// Those of `take`; an array of more dimensions has no form.
pub(super) fn elements(
    text: &str,
    delimiter: u8,
    mut take: impl FnMut(Option<Cow<'_, str>>) -> Result<(), Unfit>,
) -> Result<(), Unfit> {
    let text = match text.strip_prefix('[') {
        Some(bounded) => bounded.split_once('=').ok_or(Unfit::Malformed)?.1,
        None => text,
    };
    let inner = text.strip_prefix('{').and_then(|text| text.strip_suffix('}'));
    let mut rest = inner.ok_or(Unfit::Malformed)?;
    if rest.is_empty() {
        return Ok(());
    }
    loop {
        if rest.starts_with('{') {
            return Err(Unfit::NoForm);
        }
        if rest.starts_with('"') {
            let (element, after) = quoted(rest)?;
            take(Some(element))?;
            rest = after;
        } else {
            let end = rest.bytes().position(|byte| byte == delimiter).unwrap_or(rest.len());
            let (element, after) = rest.split_at(end);
            take((element != "NULL").then_some(Cow::Borrowed(element)))?;
            rest = after;
        }
        match rest.as_bytes().split_first() {
            None => return Ok(()),
            Some((byte, _)) if *byte == delimiter => rest = &rest[1..],
            Some(_) => return Err(Unfit::Malformed),
        }
    }
}

/// Calls `take` for each key of an hstore and its value; none stands for NULL.
///
/// # Errors
/// For what is not an hstore.
pub(super) fn pairs(text: &str, mut take: impl FnMut(&str, Option<&str>)) -> Result<(), Unfit> {
    let mut rest = text;
    while !rest.is_empty() {
        let (key, after) = quoted(rest)?;
        let after = after.strip_prefix("=>").ok_or(Unfit::Malformed)?;
        rest = if let Some(after) = after.strip_prefix("NULL") {
            take(&key, None);
            after
        } else {
            let (value, after) = quoted(after)?;
            take(&key, Some(&value));
            after
        };
        rest = match rest.strip_prefix(", ") {
            Some(next) if !next.is_empty() => next,
            None if rest.is_empty() => rest,
            _ => return Err(Unfit::Malformed),
        };
    }
    Ok(())
}

/// What is between double quotes, where a backslash makes the next character stand for itself, and what comes after.
fn quoted(text: &str) -> Result<(Cow<'_, str>, &str), Unfit> {
    let body = text.strip_prefix('"').ok_or(Unfit::Malformed)?;
    let mut unescaped: Option<String> = None;
    let mut characters = body.char_indices();
    let mut plain = 0;
    while let Some((at, character)) = characters.next() {
        match character {
            '"' => {
                let last = &body[plain..at];
                let content = match unescaped {
                    Some(text) => Cow::Owned(text + last),
                    None => Cow::Borrowed(last),
                };
                return Ok((content, &body[at + 1..]));
            }
            '\\' => {
                unescaped.get_or_insert_default().push_str(&body[plain..at]);
                plain = at + 1;
                characters.next();
            }
            _ => {}
        }
    }
    Err(Unfit::Malformed)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn read(text: &str) -> Result<Vec<Option<String>>, Unfit> {
        let mut read = Vec::new();
        elements(text, b',', |element| {
            read.push(element.map(Cow::into_owned));
            Ok(())
        })?;
        Ok(read)
    }

    #[test]
    fn an_array_of_one_dimension_is_its_elements() {
        let some = |text: &str| Some(text.to_owned());
        assert_eq!(read("{}"), Ok(vec![]));
        assert_eq!(read("{1,NULL,-3}"), Ok(vec![some("1"), None, some("-3")]));
        assert_eq!(read("[0:1]={7,8}"), Ok(vec![some("7"), some("8")]));
        assert_eq!(
            read(r#"{"NULL","a,b","q\"\\",""}"#),
            Ok(vec![some("NULL"), some("a,b"), some("q\"\\"), some("")])
        );
        assert_eq!(read("{{1},{2}}"), Err(Unfit::NoForm));
        for wrong in ["", "{", "1", "{\"a}", "{\"a\"b}"] {
            assert_eq!(read(wrong), Err(Unfit::Malformed), "{wrong}");
        }
    }

    #[test]
    fn an_hstore_is_its_pairs() {
        let mut read = Vec::new();
        pairs(r#""a"=>"1", "q\"\\"=>NULL, ""=>"""#, |key, value| {
            read.push((key.to_owned(), value.map(str::to_owned)));
        })
        .unwrap();
        assert_eq!(
            read,
            [
                ("a".to_owned(), Some("1".to_owned())),
                ("q\"\\".to_owned(), None),
                (String::new(), Some(String::new()))
            ]
        );
        for wrong in ["a", "\"a\"", "\"a\"=>", "\"a\"=>\"b\" ", "\"a\"=>\"b\", "] {
            assert_eq!(pairs(wrong, |_, _| {}), Err(Unfit::Malformed), "{wrong}");
        }
    }

    proptest! {
        #[test]
        fn any_quoted_text_reads_back(texts in proptest::collection::vec(".*", 1..5)) {
            let quoted: Vec<String> = texts.iter().map(|text| format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\""))).collect();
            let expected: Vec<Option<String>> = texts.into_iter().map(Some).collect();
            prop_assert_eq!(read(&format!("{{{}}}", quoted.join(","))), Ok(expected));
        }

        #[test]
        fn no_text_makes_the_readers_panic(text in ".*") {
            let _ = read(&text);
            let _ = pairs(&text, |_, _| {});
        }
    }
}
