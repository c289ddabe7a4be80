//! The API server of `tests/cluster/apiserver.sh`.

use std::{
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Arc, Mutex, Weak,
        atomic::{AtomicU32, Ordering},
    },
};

use kube::config::Kubeconfig;

/// An API server, which ends with the last who has it.
pub struct ApiServer {
    pub folder: PathBuf,
}

impl ApiServer {
    /// One for all tests that run at the same time.
    pub fn shared() -> Arc<Self> {
        static SHARED: Mutex<Weak<ApiServer>> = Mutex::new(Weak::new());
        let mut shared = SHARED.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if let Some(server) = shared.upgrade() {
            return server;
        }
        let server = Arc::new(Self::own());
        *shared = Arc::downgrade(&server);
        server
    }

    /// One for a test alone, which does to it what would disturb others.
    pub fn own() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let memory = Path::new("/dev/shm");
        let base = if memory.is_dir() {
            memory.to_owned()
        } else {
            std::env::temp_dir()
        };
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let server = Self {
            folder: base.join(format!("meander-operator-test-{}-{count}", std::process::id())),
        };
        server.script("up");
        server
    }

    /// Ends its process. What it stored stays.
    pub fn stop(&self) {
        self.script("stop");
    }

    /// Starts it again, at the same address.
    pub fn start(&self) {
        self.script("start");
    }

    /// As its administrator.
    pub fn kubeconfig(&self) -> Kubeconfig {
        Kubeconfig::read_from(self.folder.join("kubeconfig")).unwrap()
    }

    fn script(&self, command: &str) {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/cluster/apiserver.sh");
        let status = Command::new(script).arg(command).arg(&self.folder).status().unwrap();
        assert!(status.success(), "apiserver.sh {command} failed");
    }
}

impl Drop for ApiServer {
    fn drop(&mut self) {
        self.script("down");
    }
}
