//! What changes while things break: TPC-B by `pgbench`, and everything that makes a change hard to carry. Both go on whatever becomes of
//! the server, and what was committed is in the ledger.

use std::time::Duration;

use fastrand::Rng;
use meander_test_support::Postgres;
use meander_workload::ledger;
use tokio::{process::Command, sync::watch, task::JoinHandle};
use tokio_postgres::{Client, NoTls};

/// The load, while it goes on.
pub struct Load {
    stop: watch::Sender<bool>,
    tasks: Vec<JoinHandle<u64>>,
}

/// Transactions of TPC-B per second, of all clients.
const TPCB_RATE: &str = "25";
const TPCB_CLIENTS: &str = "4";
/// Of the others, each of them with this pause between two transactions.
const CLIENTS: u64 = 4;
const PACE: Duration = Duration::from_millis(150);
const SCHEMA_PACE: Duration = Duration::from_secs(7);
/// Before a server that is away is asked again.
const PAUSE: Duration = Duration::from_millis(200);
/// Keys of one client.
const KEYS: u64 = 300;

/// Tables with what is in them before the capture begins.
///
/// `note` is stored apart, and so not said again by a change that leaves it as it is.
const TABLES: &str = "CREATE TABLE orders (id bigint PRIMARY KEY, price bigint NOT NULL, note text);
    ALTER TABLE orders ALTER note SET STORAGE EXTERNAL;
    INSERT INTO orders VALUES (0, 0, 'is never deleted');
    CREATE TABLE items (id bigint, part int, note text, PRIMARY KEY (id, part));
    ALTER TABLE pgbench_history ADD id bigserial PRIMARY KEY;";

const WATCHED: [&str; 7] = [
    "pgbench_accounts",
    "pgbench_branches",
    "pgbench_history",
    "pgbench_tellers",
    "orders",
    "items",
    "beat",
];

/// Makes the tables, and has them watched.
pub async fn prepare(postgres: &Postgres) {
    let initialised = pgbench(postgres.port(), &postgres.url())
        .args(["-i", "-q", "-I", "dtgp", "postgres"])
        .output()
        .await
        .expect("pgbench, which comes with the PostgreSQL server");
    assert!(
        initialised.status.success(),
        "{}",
        String::from_utf8_lossy(&initialised.stderr)
    );
    let client = postgres.client().await;
    client.batch_execute(TABLES).await.unwrap();
    client.batch_execute(crate::flow::TABLE).await.unwrap();
    ledger::create(&client).await.unwrap();
    for table in WATCHED {
        ledger::watch(&client, table).await.unwrap();
    }
}

/// The password is in the URL.
fn pgbench(port: u16, url: &str) -> Command {
    let config: tokio_postgres::Config = url.parse().unwrap();
    let password = String::from_utf8(config.get_password().unwrap().to_vec()).unwrap();
    let mut command = Command::new("pgbench");
    command
        .env("PGPASSWORD", password)
        .args(["-h", "127.0.0.1", "-U", "postgres", "-p", &port.to_string()])
        .kill_on_drop(true);
    command
}

impl Load {
    /// Begins; the server is found at this port.
    pub fn start(port: u16, url: &str, seed: u64) -> Self {
        let (stop, stopped) = watch::channel(false);
        let mut tasks = vec![tokio::spawn(tpcb(port, url.to_owned(), seed, stopped.clone()))];
        for client in 0..CLIENTS {
            let worker = Worker {
                url: url.to_owned(),
                first: client * KEYS + 1,
                random: Rng::with_seed(seed.wrapping_add(client + 1)),
                stopped: stopped.clone(),
            };
            tasks.push(tokio::spawn(worker.change()));
        }
        let worker = Worker {
            url: url.to_owned(),
            first: 0,
            random: Rng::with_seed(seed),
            stopped,
        };
        tasks.push(tokio::spawn(worker.change_schema()));
        Self { stop, tasks }
    }

    /// Ends it; gives how many transactions the clients saw committed, without those of TPC-B.
    pub async fn stop(self) -> u64 {
        self.stop.send_replace(true);
        let mut committed = 0;
        for task in self.tasks {
            committed += task.await.unwrap();
        }
        committed
    }
}

/// It ends when its server does, so it is started again and again.
async fn tpcb(port: u16, url: String, seed: u64, mut stopped: watch::Receiver<bool>) -> u64 {
    for round in 0.. {
        let mut child = pgbench(port, &url)
            .args(["-n", "-c", TPCB_CLIENTS, "-R", TPCB_RATE, "-L", "2000", "-T", "86400"])
            .arg(format!("--random-seed={}", seed.wrapping_add(round) >> 1))
            .arg("postgres")
            .stdout(std::process::Stdio::null())
            .stderr(std::process::Stdio::null())
            .spawn()
            .unwrap();
        let asked = tokio::select! {
            _ = child.wait() => false,
            stopped = stopped.wait_for(|stopped| *stopped) => stopped.is_ok(),
        };
        if asked {
            child.kill().await.unwrap();
            break;
        }
        tokio::time::sleep(PAUSE).await;
    }
    0
}

/// One client, and the keys that it alone changes.
struct Worker {
    url: String,
    first: u64,
    random: Rng,
    stopped: watch::Receiver<bool>,
}

impl Worker {
    async fn change(mut self) -> u64 {
        let mut committed = 0;
        while !*self.stopped.borrow() {
            let Some(client) = connect(&self.url).await else {
                continue;
            };
            while !*self.stopped.borrow() {
                tokio::time::sleep(PACE).await;
                // What became of one that failed is the ledger's to know.
                if client.batch_execute(&self.transaction()).await.is_err() {
                    break;
                }
                committed += 1;
            }
        }
        committed
    }

    fn key(&mut self) -> u64 {
        self.first + self.random.u64(..KEYS)
    }

    fn transaction(&mut self) -> String {
        let (id, other) = (self.key(), self.key());
        let number = self.random.u32(..);
        let put = format!(
            "INSERT INTO orders (id, price, note) VALUES ({id}, {number}, 'n{number}')
             ON CONFLICT (id) DO UPDATE SET price = excluded.price"
        );
        match self.random.u32(..24) {
            0..6 => put,
            6..9 => format!("UPDATE orders SET price = price + 1 WHERE id IN ({id}, -{id}, {other})"),
            9..11 => {
                let length = self.random.u32(300..2000);
                format!("{put}; UPDATE orders SET note = repeat('{number:010}', {length}) WHERE id = {id}")
            }
            11..14 => format!(
                "UPDATE orders SET id = -id, price = price + 1
                 WHERE id IN ({id}, -{id}) AND NOT EXISTS (SELECT FROM orders o WHERE o.id = -orders.id)"
            ),
            14..16 => format!("DELETE FROM orders WHERE id IN ({id}, -{id})"),
            16..19 => format!(
                "BEGIN; {put}; SAVEPOINT a; UPDATE orders SET id = -{number} WHERE id = {id}; SAVEPOINT b;
                 DELETE FROM orders WHERE id BETWEEN {id} AND {id} + 5; ROLLBACK TO a;
                 UPDATE orders SET price = {number} WHERE id = {other}; COMMIT"
            ),
            19..21 => format!(
                "BEGIN; UPDATE orders SET note = repeat('{number}', 3000) WHERE id = {id}; {put};
                 DELETE FROM orders WHERE id = {other}; INSERT INTO items VALUES ({id}, -1, 'never'); ROLLBACK"
            ),
            21..23 => format!(
                "BEGIN; DELETE FROM items WHERE id = {id}; {put};
                 INSERT INTO items SELECT {id}, n, 'i{number}' FROM generate_series(1, {}) n;
                 UPDATE items SET part = part + 100 WHERE id = {id} AND part % 3 = 0; COMMIT",
                self.random.u32(1..40)
            ),
            _ if self.random.u32(..10) == 0 => format!("BEGIN; TRUNCATE items; {put}; COMMIT"),
            _ => format!("DELETE FROM items WHERE id = {id}"),
        }
    }

    /// The table gets a column and loses the one before, under names that never come again, and a change follows that tells it.
    async fn change_schema(mut self) -> u64 {
        let mut committed = 0;
        while !*self.stopped.borrow() {
            let Some(client) = connect(&self.url).await else {
                continue;
            };
            loop {
                let asked = self.stopped.wait_for(|stopped| *stopped);
                if tokio::time::timeout(SCHEMA_PACE, asked).await.is_ok() {
                    break;
                }
                if self.alter(&client).await.is_err() {
                    break;
                }
                committed += 1;
            }
        }
        committed
    }

    async fn alter(&mut self, client: &Client) -> Result<(), tokio_postgres::Error> {
        const ADDED: &str = "SELECT attname::text FROM pg_attribute
            WHERE attrelid = 'orders'::regclass AND NOT attisdropped AND attname LIKE 'more%'";
        let drop: String = client
            .query(ADDED, &[])
            .await?
            .iter()
            .map(|row| format!("ALTER TABLE orders DROP COLUMN {};", row.get::<_, String>(0)))
            .collect();
        let name = format!("more_{:x}", self.random.u64(..));
        let alter = format!(
            "BEGIN; SET LOCAL lock_timeout = '5s'; {drop} ALTER TABLE orders ADD COLUMN {name} text;
             SELECT meander_ledger.watch('orders'); UPDATE orders SET price = price + 1, {name} = '{name}' WHERE id = 0; COMMIT"
        );
        client.batch_execute(&alter).await
    }
}

/// A connection, if the server takes one.
async fn connect(url: &str) -> Option<Client> {
    match tokio_postgres::connect(url, NoTls).await {
        Ok((client, connection)) => {
            tokio::spawn(connection);
            Some(client)
        }
        Err(_) => {
            tokio::time::sleep(PAUSE).await;
            None
        }
    }
}
