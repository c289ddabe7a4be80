//! Which logical messages are published, and where to.

use std::sync::Arc;

use globset::{GlobBuilder, GlobMatcher};
use meander_config::CaptureConfig;

use crate::{batch::Destination, log::message_topic, sink::topics::Topics, source::Message};

/// Prefixes of the messages that the runtime writes for itself.
const OURS: &str = "meander.";

/// The selection by `messagePrefixes`.
pub(super) struct Messages {
    prefixes: Vec<GlobMatcher>,
    pub(super) destination: Arc<Destination>,
}

impl Messages {
    pub(super) fn new(config: &CaptureConfig, topics: &mut Topics) -> Self {
        let topic = message_topic(&config.kafka.topic_prefix);
        Self {
            prefixes: config
                .source
                .message_prefixes
                .iter()
                .filter_map(|glob| matcher(glob))
                .collect(),
            destination: Arc::new(Destination {
                limit: topics.limit(&topic),
                topic,
                stream: config
                    .redis
                    .as_ref()
                    .map(|redis| message_topic(&redis.stream_prefix))
                    .unwrap_or_default(),
            }),
        }
    }

    /// True for a message that is published.
    pub(super) fn hold(&self, message: &Message<'_>) -> bool {
        !message.prefix.starts_with(OURS) && self.prefixes.iter().any(|prefix| prefix.is_match(message.prefix))
    }
}

/// `*` and `?` stand for any characters and any one, everything else for itself; so there is no glob that is not valid.
fn matcher(glob: &str) -> Option<GlobMatcher> {
    let escaped: String = glob
        .chars()
        .map(|character| match character {
            '*' | '?' => character.to_string(),
            other => globset::escape(&other.to_string()),
        })
        .collect();
    let glob = GlobBuilder::new(&escaped).backslash_escape(false).build().ok()?;
    Some(glob.compile_matcher())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_text_is_a_glob() {
        for text in ["a[", "{b", "c\\", "]!^-", "*?", ""] {
            let matcher = matcher(text).unwrap();
            assert!(matcher.is_match(text), "{text}");
        }
        assert!(!matcher("app.*").unwrap().is_match("application"));
        assert!(matcher("app.*").unwrap().is_match("app.orders/eu"));
    }
}
