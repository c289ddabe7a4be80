//! PostgreSQL.

use std::{
    collections::BTreeMap,
    env, fs,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    process::Command,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use rustix::process::Signal;
use tempfile::TempDir;
use tokio_postgres::{Client, NoTls};

use crate::{
    ports::free_port,
    process::{Process, folder, root},
};

const LIMIT: Duration = Duration::from_secs(240);
const USER: &str = "postgres";
const PASSWORD: &str = "s3cret-of-the-tests";
const DATABASE: &str = "postgres";

/// What differs from a server as it comes: logical decoding is on, nothing waits for the disk, little memory is used.
const SETTINGS: &[(&str, &str)] = &[
    ("wal_level", "logical"),
    ("fsync", "off"),
    ("full_page_writes", "off"),
    ("shared_buffers", "32MB"),
    ("max_connections", "50"),
    ("max_wal_senders", "10"),
    ("max_replication_slots", "10"),
    ("listen_addresses", "127.0.0.1"),
    ("unix_socket_directories", ""),
    // Instead of /dev/shm, where a killed server would leave files.
    ("dynamic_shared_memory_type", "mmap"),
    ("log_min_messages", "info"),
];

/// A PostgreSQL server with the database `postgres` and the superuser `postgres`, who has to show a password.
pub struct Postgres {
    process: Process,
    port: u16,
    folder: TempDir,
    installation: Installation,
}

impl Postgres {
    /// The major versions that [`start_version`](Self::start_version) knows.
    pub const VERSIONS: [u32; 5] = [14, 15, 16, 17, 18];

    /// Starts the machine's own server with these settings besides the usual ones, for example `&[("wal_level", "replica")]`.
    pub async fn start(settings: &[(&str, &str)]) -> Self {
        Self::start_installation(None, settings).await
    }

    /// Starts a server of this major version, with its contrib modules.
    pub async fn start_version(major: u32, settings: &[(&str, &str)]) -> Self {
        Self::start_installation(Some(major), settings).await
    }

    async fn start_installation(major: Option<u32>, settings: &[(&str, &str)]) -> Self {
        let installation = Installation::get(major);
        let folder = folder("postgres");
        let data = folder.path().join("data");
        run(Command::new("cp").arg("-a").arg(&installation.template).arg(&data));
        Self::launch(installation, folder, settings).await
    }

    /// Starts a hot standby of this server, which streams from the physical slot `standby`. For a copy of its data the server is ended
    /// and started again.
    pub async fn standby(&mut self, settings: &[(&str, &str)]) -> Self {
        let client = self.client().await;
        let made = client.batch_execute("SELECT pg_create_physical_replication_slot('standby', true)");
        made.await.unwrap();
        drop(client);
        self.stop();
        let folder = folder("postgres");
        let data = folder.path().join("data");
        run(Command::new("cp")
            .arg("-a")
            .arg(self.folder.path().join("data"))
            .arg(&data));
        // No copy has the slots of the other server; those of a failover come by being synced.
        for slot in fs::read_dir(data.join("pg_replslot")).unwrap().map(Result::unwrap) {
            fs::remove_dir_all(slot.path()).unwrap();
        }
        run(as_postgres(Path::new("touch")).arg(data.join("standby.signal")));
        self.start_again().await;
        let primary = format!(
            "host=127.0.0.1 port={} user={USER} password={PASSWORD} dbname={DATABASE}",
            self.port
        );
        let settings: Vec<_> = [("primary_conninfo", primary.as_str()), ("primary_slot_name", "standby")]
            .into_iter()
            .chain(settings.iter().copied())
            .collect();
        Self::launch(self.installation.clone(), folder, &settings).await
    }

    async fn launch(installation: Installation, folder: TempDir, settings: &[(&str, &str)]) -> Self {
        let port = free_port();
        let data = folder.path().join("data");
        let mut command = as_postgres(&installation.programs.join("postgres"));
        command.arg("-D").arg(&data).args(["-p", &port.to_string()]);
        for (name, value) in SETTINGS.iter().chain(settings) {
            command.arg("-c").arg(format!("{name}={value}"));
        }
        // SIGQUIT is the immediate shutdown: no checkpoint, but shared memory is given back.
        let process = Process::start("postgres", folder.path(), &command, Signal::QUIT);
        fs::write(folder.path().join("username"), USER).unwrap();
        fs::write(folder.path().join("password"), PASSWORD).unwrap();
        let mut postgres = Self {
            process,
            port,
            folder,
            installation,
        };
        postgres.ready().await;
        postgres
    }

    /// One of the programs that come with the machine's own server.
    #[must_use]
    pub fn program(name: &str) -> PathBuf {
        own_programs().join(name)
    }

    /// The port on 127.0.0.1.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.port
    }

    /// `postgres://…`, with user, password and database.
    #[must_use]
    pub fn url(&self) -> String {
        format!("postgres://{USER}:{PASSWORD}@127.0.0.1:{}/{DATABASE}", self.port)
    }

    /// The name of the database.
    #[must_use]
    pub fn database(&self) -> &'static str {
        DATABASE
    }

    /// A file that holds the user name, as the runtime's configuration names it.
    #[must_use]
    pub fn username_file(&self) -> PathBuf {
        self.folder.path().join("username")
    }

    /// A file that holds the password.
    #[must_use]
    pub fn password_file(&self) -> PathBuf {
        self.folder.path().join("password")
    }

    /// A connection of the superuser.
    ///
    /// # Panics
    /// When the server refuses it.
    pub async fn client(&self) -> Client {
        connect(&self.url())
            .await
            .unwrap_or_else(|error| panic!("{error}\n{}", self.process.log_tail()))
    }

    /// Ends the server in good order (a fast shutdown: transactions are rolled back, WAL senders finish).
    pub fn stop(&mut self) {
        self.process.signal(Signal::INT);
        self.process.wait(LIMIT);
    }

    /// Begins new WAL, past that of another server, as `pg_resetwal -l` does at the end of `pg_upgrade`. Both servers are stopped.
    pub fn begin_wal_after(&self, other: &Self) {
        let data = self.folder.path().join("data");
        let control = Control::read(&data.join("global/pg_control"));
        let end = Control::read(&other.folder.path().join("data/global/pg_control")).checkpoint();
        let segment = end.max(control.checkpoint()) / SEGMENT + 2;
        control.begin_wal(&data, segment);
    }

    /// Kills the server and all its backends; the next start recovers from WAL.
    pub fn kill9(&mut self) {
        self.process.kill9();
    }

    /// Starts a server that was ended, with the same data at the same port.
    pub async fn start_again(&mut self) {
        self.process.start_again();
        self.ready().await;
    }

    /// Ends the server in good order and starts it again.
    pub async fn restart(&mut self) {
        self.stop();
        self.start_again().await;
    }

    /// Where its files are.
    #[must_use]
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// The process, for whoever wants to hurt it in other ways.
    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }

    async fn ready(&mut self) {
        let url = self.url();
        self.process.ready(LIMIT, async || connect(&url).await).await;
    }
}

async fn connect(url: &str) -> Result<Client, String> {
    let (client, connection) = tokio_postgres::connect(url, NoTls).await.map_err(|error| {
        format!(
            "postgres: {error}: {}",
            error.as_db_error().map_or("", |cause| cause.message())
        )
    })?;
    // It ends with the client; what goes wrong before is the error of the query that meets it.
    tokio::spawn(connection);
    Ok(client)
}

/// A server's programs, and a data directory as `initdb` makes it. That takes a second or two, a copy a fraction of it.
#[derive(Clone)]
struct Installation {
    programs: PathBuf,
    template: PathBuf,
}

impl Installation {
    /// That of a major version, or the machine's own.
    fn get(major: Option<u32>) -> Self {
        static KNOWN: Mutex<BTreeMap<Option<u32>, Installation>> = Mutex::new(BTreeMap::new());
        KNOWN
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .entry(major)
            .or_insert_with(|| Self::make(major))
            .clone()
    }

    fn make(major: Option<u32>) -> Self {
        let name = major.map_or("own".to_owned(), |major| major.to_string());
        let folder = root().join(format!("postgres-template-{name}"));
        fs::create_dir(&folder).unwrap();
        let programs = match major {
            None => own_programs(),
            Some(major) => fetched_programs(major, &folder),
        };
        let template = folder.join("data");
        let password = folder.join("password");
        fs::write(&password, PASSWORD).unwrap();
        if is_root() {
            run(Command::new("chown").arg(USER).arg(&folder).arg(&password));
        }
        run(as_postgres(&programs.join("initdb"))
            .args([
                "--no-sync",
                "--auth=scram-sha-256",
                "--encoding=UTF8",
                "--locale=C",
                "--username",
                USER,
            ])
            .arg("--pwfile")
            .arg(&password)
            .arg("-D")
            .arg(&template));
        Self { programs, template }
    }
}

/// `$MEANDER_POSTGRES_BIN`, or the newest version that Debian's packages installed.
fn own_programs() -> PathBuf {
    if let Some(folder) = env::var_os("MEANDER_POSTGRES_BIN") {
        return folder.into();
    }
    let version = |path: &PathBuf| path.file_name().and_then(|name| name.to_str()?.parse::<u32>().ok());
    fs::read_dir("/usr/lib/postgresql")
        .into_iter()
        .flatten()
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.join("bin/initdb").exists())
        .max_by_key(version)
        .map(|path| path.join("bin"))
        .expect("no PostgreSQL server in /usr/lib/postgresql: run tests/setup.sh, or set MEANDER_POSTGRES_BIN")
}

/// What `tests/setup.sh postgres` fetched, linked to where the user that PostgreSQL runs as may read it.
fn fetched_programs(major: u32, folder: &Path) -> PathBuf {
    let cache = crate::cache();
    let prefix = format!("postgres-{major}.");
    let fetched = fs::read_dir(&cache)
        .into_iter()
        .flatten()
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| {
            path.file_name()
                .is_some_and(|name| name.to_string_lossy().starts_with(&prefix))
        })
        .max()
        .unwrap_or_else(|| {
            panic!(
                "no PostgreSQL {major} in {}: run tests/setup.sh postgres",
                cache.display()
            )
        });
    let here = folder.join("server");
    let linked = Command::new("cp").arg("-al").arg(&fetched).arg(&here).output().unwrap();
    if !linked.status.success() {
        // Another file system: hard links end there.
        let _ = fs::remove_dir_all(&here);
        run(Command::new("cp").arg("-a").arg(&fetched).arg(&here));
    }
    here.join("bin")
}

/// Bytes of WAL in a file.
const SEGMENT: u64 = 16 << 20;

/// The file that says where a stopped server goes on, of versions 17 and 18.
struct Control {
    path: PathBuf,
    bytes: Vec<u8>,
}

impl Control {
    /// Where its fields are, see `src/include/catalog/pg_control.h`: the place of the last checkpoint, and that checkpoint itself.
    const CHECKPOINT: usize = 32;
    const COPY: std::ops::Range<usize> = 40..128;

    fn read(path: &Path) -> Self {
        let bytes = fs::read(path).unwrap();
        let control = Self {
            path: path.to_owned(),
            bytes,
        };
        let redo = control.number(Self::COPY.start);
        assert_eq!(
            control.checkpoint(),
            redo,
            "the server was not shut down, or is of another version"
        );
        control
    }

    fn number(&self, at: usize) -> u64 {
        u64::from_le_bytes(self.bytes[at..at + 8].try_into().unwrap())
    }

    fn checkpoint(&self) -> u64 {
        self.number(Self::CHECKPOINT)
    }

    /// Replaces all WAL by a segment that holds a checkpoint and nothing else.
    fn begin_wal(mut self, data: &Path, segment: u64) {
        const PAGE_HEADER: usize = 40;
        let folder = data.join("pg_wal");
        let name = |segment: u64| format!("00000001{:08X}{:08X}", segment / 256, segment % 256);
        let last = fs::read(folder.join(name(self.checkpoint() / SEGMENT))).unwrap();
        for file in fs::read_dir(&folder).unwrap().map(Result::unwrap) {
            if file.file_type().unwrap().is_file() {
                fs::remove_file(file.path()).unwrap();
            }
        }
        let crc_at = (Self::COPY.end..512)
            .find(|at| crc32c(&self.bytes[..*at]).to_le_bytes() == self.bytes[*at..*at + 4])
            .unwrap();
        let place = (segment * SEGMENT + PAGE_HEADER as u64).to_le_bytes();
        self.bytes[Self::CHECKPOINT..][..8].copy_from_slice(&place);
        self.bytes[Self::COPY.start..][..8].copy_from_slice(&place);
        let crc = crc32c(&self.bytes[..crc_at]);
        self.bytes[crc_at..][..4].copy_from_slice(&crc.to_le_bytes());

        let mut body = vec![0xff, u8::try_from(Self::COPY.len()).unwrap()];
        body.extend(&self.bytes[Self::COPY]);
        let mut header = [0; 20];
        header[..4].copy_from_slice(&u32::try_from(24 + body.len()).unwrap().to_le_bytes());
        let crc = crc32c(&[&body[..], &header[..]].concat());
        let mut wal = last[..PAGE_HEADER].to_vec();
        // No record goes on from the segment before.
        wal[2..4].copy_from_slice(&2_u16.to_le_bytes());
        wal[8..16].copy_from_slice(&(segment * SEGMENT).to_le_bytes());
        wal[16..20].fill(0);
        wal.extend([&header[..], &crc.to_le_bytes(), &body].concat());
        wal.resize(usize::try_from(SEGMENT).unwrap(), 0);

        let file = folder.join(name(segment));
        fs::write(&file, wal).unwrap();
        let owner = fs::metadata(&self.path).unwrap();
        std::os::unix::fs::chown(&file, Some(owner.uid()), Some(owner.gid())).unwrap();
        fs::write(&self.path, self.bytes).unwrap();
    }
}

/// The check that PostgreSQL gives its records and files.
fn crc32c(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0_u32, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| {
            (crc >> 1) ^ (0x82F6_3B78 & 0_u32.wrapping_sub(crc & 1))
        })
    })
}

/// PostgreSQL refuses to run as root.
fn as_postgres(program: &Path) -> Command {
    if !is_root() {
        return Command::new(program);
    }
    let mut command = Command::new("setpriv");
    command
        .args(["--reuid", USER, "--regid", USER, "--init-groups", "--"])
        .arg(program);
    command
}

fn is_root() -> bool {
    fs::metadata("/proc/self").unwrap().uid() == 0
}

fn run(command: &mut Command) {
    let output = command
        .output()
        .unwrap_or_else(|error| panic!("{command:?}: {error}: run tests/setup.sh"));
    assert!(
        output.status.success(),
        "{command:?}: {}\n{}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr),
    );
}
