//! Processes that end with the test that started them.
//!
//! Dropping a handle ends its process. That does not cover a test process that is killed, nor services shared through a
//! static, so there is one guard per test process: a shell that waits until its standard input closes, which it does when the
//! test process is gone, and then kills every process that is still noted in `pids/` and removes the folder. (The kernel's
//! parent-death signal will not do: it is sent when the *thread* that started the process ends, and each test has its own.)

use std::{
    fs::{self, File},
    io::{Read as _, Seek as _, SeekFrom},
    os::unix::{fs::PermissionsExt as _, process::CommandExt as _},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::OnceLock,
    thread,
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, kill_process, kill_process_group};
use tempfile::TempDir;

use crate::{disk, wait::INTERVAL};

const GUARD: &str = r#"
cat >/dev/null
for file in "$0"/pids/*; do [ ! -e "$file" ] || kill -s KILL -- "-$(cat "$file")"; done
tries=0
until { for folder in "$0"/*; do umount "$folder" 2>/dev/null; done; rm -rf "$0"; } || [ $((tries += 1)) -gt 50 ]; do sleep 0.1; done
"#;

/// Notes its own process id before it becomes the service, so that the guard never misses one. The file is gone if the guard
/// was faster; then nothing is started.
const STARTER: &str = r#"echo $$ >"$0" && exec "$@""#;

/// How long a killed process may take to be gone.
const KILL_LIMIT: Duration = Duration::from_secs(60);

/// How much of a log is shown.
const TAIL_BYTES: i64 = 16 * 1024;

struct Guarded {
    root: PathBuf,
    /// It waits for the end of its standard input, which is held here.
    _guard: Child,
}

/// The folder that holds all files of this test process.
pub(crate) fn root() -> &'static Path {
    static GUARDED: OnceLock<Guarded> = OnceLock::new();
    &GUARDED
        .get_or_init(|| {
            let root = tempfile::Builder::new()
                .prefix("meander-test-")
                .tempdir()
                .expect("a temporary folder")
                .keep();
            // PostgreSQL runs as another user when the tests run as root, and has to pass through.
            fs::set_permissions(&root, fs::Permissions::from_mode(0o755)).unwrap();
            fs::create_dir(root.join("pids")).unwrap();
            let guard = Command::new("sh")
                .args(["-c", GUARD])
                .arg(&root)
                .stdin(Stdio::piped())
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .process_group(0)
                .spawn()
                .expect("sh");
            Guarded { root, _guard: guard }
        })
        .root
}

/// A folder for one service, removed with its handle.
#[must_use]
pub fn folder(name: &str) -> TempDir {
    let folder = tempfile::Builder::new()
        .prefix(&format!("{name}-"))
        .tempdir_in(root())
        .unwrap();
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).unwrap();
    disk::give(folder.path());
    folder
}

/// A process in a process group of its own, with its output in a log file.
pub struct Process {
    name: String,
    command: Command,
    /// What ends it in good order.
    stop_signal: Signal,
    child: Option<Child>,
    pid_file: PathBuf,
    log: PathBuf,
}

impl Process {
    /// Starts a program, for which `stop_signal` is the good way to end; the log goes to `<folder>/log`.
    #[must_use]
    pub fn start(name: &str, folder: &Path, program: &Command, stop_signal: Signal) -> Self {
        let pid_file = root().join("pids").join(crate::unique_name(name));
        let log = folder.join("log");
        let output = File::options().create(true).append(true).open(&log).unwrap();
        let mut command = Command::new("sh");
        command
            .args(["-c", STARTER])
            .arg(&pid_file)
            .arg(program.get_program())
            .args(program.get_args());
        for (key, value) in program.get_envs() {
            match value {
                Some(value) => command.env(key, value),
                None => command.env_remove(key),
            };
        }
        command
            .stdin(Stdio::null())
            .stdout(output.try_clone().unwrap())
            .stderr(output)
            .process_group(0);
        let mut process = Self {
            name: name.to_owned(),
            command,
            stop_signal,
            child: None,
            pid_file,
            log,
        };
        process.start_again();
        process
    }

    /// Starts the same program again after it was ended.
    ///
    /// # Panics
    /// When it still runs.
    pub fn start_again(&mut self) {
        assert!(self.child.is_none(), "{} runs already", self.name);
        self.child = Some(self.command.spawn().expect("sh"));
    }

    /// The process id; `None` when it was ended.
    #[must_use]
    pub fn id(&self) -> Option<u32> {
        self.child.as_ref().map(Child::id)
    }

    /// Where its output goes.
    #[must_use]
    pub fn log(&self) -> &Path {
        &self.log
    }

    /// The end of its output.
    #[must_use]
    pub fn log_tail(&self) -> String {
        let mut text = Vec::new();
        if let Ok(mut file) = File::open(&self.log) {
            // A shorter file is shown from its start, where a refused seek leaves it.
            let _ = file.seek(SeekFrom::End(-TAIL_BYTES));
            let _ = file.read_to_end(&mut text);
        }
        format!(
            "--- log of {} ({})\n{}---",
            self.name,
            self.log.display(),
            String::from_utf8_lossy(&text)
        )
    }

    /// Sends a signal to the process alone.
    ///
    /// # Panics
    /// When it does not run.
    pub fn signal(&self, signal: Signal) {
        let child = self
            .child
            .as_ref()
            .unwrap_or_else(|| panic!("{} does not run", self.name));
        // One that has just ended by itself is a zombie until it is waited for, so this is never another's process id.
        kill_process(pid(child), signal).unwrap();
    }

    /// Sends a signal to the process and to its children, whatever session they are in.
    ///
    /// # Panics
    /// When it does not run.
    pub fn signal_all(&self, signal: Signal) {
        self.signal(signal);
        for child in self.children() {
            // An error says that it is gone.
            let _ = kill_process(child, signal);
        }
    }

    fn children(&self) -> Vec<Pid> {
        let path = self.id().map(|id| format!("/proc/{id}/task/{id}/children"));
        let ids = path.and_then(|path| fs::read_to_string(path).ok()).unwrap_or_default();
        ids.split_whitespace()
            .filter_map(|id| Pid::from_raw(id.parse().ok()?))
            .collect()
    }

    /// SIGKILL for the whole process group, and for children that left it for a session of their own.
    pub fn kill9(&mut self) {
        let children = self.children();
        let Some(mut child) = self.child.take() else { return };
        // An error says that it is gone already.
        let _ = kill_process_group(pid(&child), Signal::KILL);
        for grandchild in &children {
            let _ = kill_process(*grandchild, Signal::KILL);
        }
        child.wait().unwrap();
        // Whoever starts again must find nothing of them: PostgreSQL refuses to while a backend still has its shared memory.
        let deadline = Instant::now() + KILL_LIMIT;
        while children.iter().any(|child| lives(*child)) && Instant::now() < deadline {
            thread::sleep(INTERVAL);
        }
        self.forget();
    }

    /// Ends it in good order.
    ///
    /// # Panics
    /// When it has not ended when `limit` has passed.
    pub fn stop(&mut self, limit: Duration) -> ExitStatus {
        self.signal(self.stop_signal);
        self.wait(limit)
    }

    /// Waits for its end.
    ///
    /// # Panics
    /// When it has not ended when `limit` has passed.
    pub fn wait(&mut self, limit: Duration) -> ExitStatus {
        self.wait_until(Instant::now() + limit)
            .unwrap_or_else(|| panic!("{} has not ended within {limit:?}\n{}", self.name, self.log_tail()))
    }

    fn wait_until(&mut self, deadline: Instant) -> Option<ExitStatus> {
        loop {
            if let Some(status) = self.exit_status() {
                return Some(status);
            }
            if Instant::now() >= deadline {
                return None;
            }
            thread::sleep(INTERVAL);
        }
    }

    /// How it ended, if it has.
    ///
    /// # Panics
    /// When it was never running.
    pub fn exit_status(&mut self) -> Option<ExitStatus> {
        let child = self
            .child
            .as_mut()
            .unwrap_or_else(|| panic!("{} does not run", self.name));
        let status = child.try_wait().unwrap()?;
        self.child = None;
        self.forget();
        Some(status)
    }

    /// Tries until it succeeds; fails at once when the process ends before.
    pub(crate) async fn ready<T>(&mut self, limit: Duration, mut attempt: impl AsyncFnMut() -> Result<T, String>) -> T {
        let deadline = Instant::now() + limit;
        loop {
            match attempt().await {
                Ok(value) => return value,
                Err(error) => {
                    if let Some(status) = self.exit_status() {
                        panic!("{} ended before it was ready: {status}\n{}", self.name, self.log_tail());
                    }
                    if Instant::now() >= deadline {
                        panic!(
                            "{} is not ready within {limit:?}: {error}\n{}",
                            self.name,
                            self.log_tail()
                        );
                    }
                    tokio::time::sleep(INTERVAL).await;
                }
            }
        }
    }

    /// The guard need not end it any more.
    fn forget(&self) {
        let _ = fs::remove_file(&self.pid_file);
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if thread::panicking() {
            eprintln!("{}", self.log_tail());
        }
        if self.child.is_some() {
            self.signal(self.stop_signal);
            if self.wait_until(Instant::now() + Duration::from_secs(5)).is_none() {
                self.kill9();
            }
        }
    }
}

fn pid(child: &Child) -> Pid {
    Pid::from_child(child)
}

/// False for a zombie, too, which holds nothing any more.
fn lives(process: Pid) -> bool {
    fs::read_to_string(format!("/proc/{}/stat", process.as_raw_nonzero()))
        .is_ok_and(|stat| !stat.rsplit_once(") ").is_some_and(|(_, state)| state.starts_with('Z')))
}
