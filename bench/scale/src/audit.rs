//! What the operator asked, by the API server's own audit log.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{BufRead as _, BufReader, Seek as _, SeekFrom},
    path::Path,
};

use serde_json::Value;

const OPERATOR: &str = "system:serviceaccount:scale:operator";

/// The log, from where it was last read.
pub(crate) struct Audit(BufReader<File>);

impl Audit {
    pub(crate) fn open(path: &Path) -> anyhow::Result<Self> {
        let mut file = File::open(path)?;
        file.seek(SeekFrom::End(0))?;
        Ok(Self(BufReader::new(file)))
    }

    /// What was asked since this was last called.
    pub(crate) fn requests(&mut self) -> anyhow::Result<Requests> {
        let mut requests = Requests::default();
        let mut line = String::new();
        while self.0.read_line(&mut line)? > 0 {
            if !line.ends_with('\n') {
                // It is being written.
                self.0.seek_relative(-i64::try_from(line.len())?)?;
                break;
            }
            let entry: Value = serde_json::from_str(&line)?;
            requests.count(&entry);
            line.clear();
        }
        Ok(requests)
    }
}

#[derive(Default)]
pub(crate) struct Requests {
    /// By what is done with which kind.
    kinds: BTreeMap<String, u64>,
    /// Statuses that were written, by resource.
    statuses: BTreeMap<String, u64>,
}

impl Requests {
    fn count(&mut self, entry: &Value) {
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let verb = text(&entry["verb"]);
        // A watch is counted when it begins, everything else when it has been answered.
        let stage = if verb == "watch" {
            "ResponseStarted"
        } else {
            "ResponseComplete"
        };
        if entry["user"]["username"] != OPERATOR || entry["stage"] != stage {
            return;
        }
        let object = &entry["objectRef"];
        let mut kind = text(&object["resource"]);
        if let Some(part) = object["subresource"].as_str() {
            kind = format!("{kind}/{part}");
        }
        if kind.ends_with("/status") {
            let resource = format!("{kind} {}", text(&object["name"]));
            *self.statuses.entry(resource).or_default() += 1;
        }
        *self.kinds.entry(format!("{verb} {kind}")).or_default() += 1;
    }

    pub(crate) fn total(&self) -> u64 {
        self.kinds.values().sum()
    }

    pub(crate) fn status_patches(&self) -> u64 {
        self.statuses.values().sum()
    }

    /// The most that one resource's status was written.
    pub(crate) fn most_of_one(&self) -> u64 {
        self.statuses.values().copied().max().unwrap_or(0)
    }

    pub(crate) fn print(&self, what: &str) {
        let kinds: Vec<String> = self
            .kinds
            .iter()
            .map(|(kind, count)| format!("{kind} {count}"))
            .collect();
        println!("{what}: {} requests: {}", self.total(), kinds.join(", "));
    }
}
