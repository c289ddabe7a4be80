//! The last word of a replay, as long as Kubernetes lets it be.

use std::path::Path;

use meander_proto::{
    FinalWord,
    v1::{OtherTopics, TopicProgress},
};

/// Kubernetes keeps so much of a termination message.
const LONGEST: usize = 4096;
/// How much of it each sentence may take.
const LONGEST_SENTENCE: usize = 1024;

/// Writes it to where Kubernetes reads it.
pub async fn write(path: &Path, word: FinalWord) {
    let written = match fitting(word, LONGEST) {
        Ok(json) => tokio::fs::write(path, json).await,
        Err(error) => Err(error.into()),
    };
    if let Err(error) = written {
        tracing::warn!(%error, path = %path.display(), "cannot write the termination message");
    }
}

/// As JSON of at most this length, with as many of the topics as fit.
fn fitting(mut word: FinalWord, longest: usize) -> serde_json::Result<Vec<u8>> {
    word.message = shortened(&word.message);
    word.truncated = shortened(&word.truncated);
    let mut json = serde_json::to_vec(&word)?;
    while json.len() > longest
        && let Some(last) = word.progress.topics.pop()
    {
        let others = word.progress.other_topics.get_or_insert_default();
        add(others, &last);
        json = serde_json::to_vec(&word)?;
    }
    Ok(json)
}

fn add(others: &mut OtherTopics, topic: &TopicProgress) {
    others.topics += 1;
    others.delivered += topic.delivered;
    others.bytes += topic.bytes;
}

/// The beginning of a sentence, if it would be too long as JSON.
fn shortened(sentence: &str) -> String {
    let mut length = 0;
    let kept: String = (sentence.chars())
        .take_while(|character| {
            length += match character {
                '"' | '\\' | '\n' | '\r' | '\t' => 2,
                // \u0000
                control if control.is_ascii_control() => 6,
                other => other.len_utf8(),
            };
            length <= LONGEST_SENTENCE
        })
        .collect();
    if kept.len() < sentence.len() {
        kept + "…"
    } else {
        kept
    }
}

#[cfg(test)]
mod tests {
    use meander_proto::v1::ReplayProgress;

    use super::*;

    #[test]
    fn whatever_it_has_to_say_fits_and_can_be_read() {
        let topic = |number: u64| TopicProgress {
            topic: format!("{}{number}", "t".repeat(240)),
            delivered: number,
            bytes: u64::MAX / 100,
            first_time_micros: i64::MIN,
            last_time_micros: i64::MAX,
        };
        for text in ["\u{1}", "\"", "ß", "x"] {
            let word = FinalWord {
                phase: "Failed".to_owned(),
                reason: "ReceiverRefused".to_owned(),
                message: text.repeat(5000),
                truncated: text.repeat(5000),
                progress: ReplayProgress {
                    delivered: 1275,
                    topics: (1..=50).rev().map(topic).collect(),
                    ..ReplayProgress::default()
                },
            };
            let json = fitting(word.clone(), LONGEST).unwrap();
            assert!(json.len() <= LONGEST, "{}", json.len());
            let read: FinalWord = serde_json::from_slice(&json).unwrap();
            assert!(read.message.starts_with(text) && read.message.ends_with('…'));
            let (topics, others) = (read.progress.topics, read.progress.other_topics.unwrap());
            assert_eq!(topics, word.progress.topics[..topics.len()], "those with the most");
            assert!(!topics.is_empty());
            let told: u64 = topics.iter().map(|topic| topic.delivered).sum();
            assert_eq!(
                (told + others.delivered, topics.len() as u64 + others.topics),
                (1275, 50)
            );
        }
    }
}
