//! Inserts, updates and deletes: alone, several to a transaction, rolled back, and rolled back to a savepoint.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};
use fastrand::Rng;
use serde::Serialize;
use tokio::task::JoinSet;
use tokio_postgres::{Client, Config, NoTls, Transaction};

use crate::ledger;

/// What to do, and how fast.
#[derive(Clone, Debug)]
pub struct Load {
    /// The table, as in SQL; its columns are at least those that [`prepare`] creates.
    pub table: String,
    /// Committed changes to make.
    pub changes: u64,
    /// Changes per second; 0 is as fast as it goes.
    pub rate: f64,
    /// What is done is decided by this number and the number of clients.
    pub seed: u64,
    /// Connections that work at the same time, each on rows of its own.
    pub clients: u64,
    /// Change the key in some of the updates.
    pub key_changes: bool,
}

/// What was done.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Summary {
    /// Committed changes.
    pub changes: u64,
    /// Committed transactions.
    pub transactions: u64,
    /// How long it took.
    pub seconds: f64,
    /// The server's clock before the first transaction, RFC 3339. No commit is earlier.
    pub from: String,
    /// The server's clock after the last transaction. No commit is later.
    pub to: String,
}

/// Connects, and goes on in the background for as long as the client is there.
///
/// # Errors
/// When the server cannot be reached or refuses.
pub async fn connect(config: &Config) -> anyhow::Result<Client> {
    let (client, connection) = config.connect(NoTls).await.context("cannot connect to PostgreSQL")?;
    // It ends with the client; what goes wrong before is the error of the query that meets it.
    tokio::spawn(connection);
    Ok(client)
}

/// Creates the table and the ledger where they are missing, and has the table watched.
///
/// # Errors
/// What PostgreSQL says.
pub async fn prepare(client: &Client, table: &str) -> anyhow::Result<()> {
    // The columns with defaults that the load does not name are there for their types.
    let create = format!(
        "CREATE TABLE IF NOT EXISTS {table} (
            trade_id uuid NOT NULL,
            symbol text NOT NULL,
            price numeric(12,2) NOT NULL,
            quantity integer NOT NULL,
            side text NOT NULL,
            traded_at timestamptz NOT NULL,
            fee double precision DEFAULT random() * 10,
            settled boolean DEFAULT random() < 0.5,
            details jsonb DEFAULT jsonb_build_object('venue', 'X\"' || chr(233), 'lots', (random() * 9)::int),
            signature bytea DEFAULT decode(md5(random()::text), 'hex'),
            note text,
            PRIMARY KEY (trade_id, traded_at)
        )"
    );
    client
        .batch_execute(&create)
        .await
        .with_context(|| format!("cannot create {table}"))?;
    ledger::create(client).await.context("cannot create the ledger")?;
    ledger::watch(client, table)
        .await
        .with_context(|| format!("cannot watch {table}"))
}

/// Does all of it; the table is [prepared](prepare).
///
/// # Errors
/// When a change fails.
pub async fn run(config: &Config, load: &Load) -> anyhow::Result<Summary> {
    let observer = connect(config).await?;
    let from = server_time(&observer).await?;
    let start = Instant::now();
    let claimed = std::sync::Arc::new(AtomicU64::new(0));
    let mut workers = JoinSet::new();
    for number in 0..load.clients {
        let worker = Worker {
            client: connect(config).await?,
            load: load.clone(),
            statements: Statements::new(&load.table),
            random: Rng::with_seed(load.seed.wrapping_mul(load.clients).wrapping_add(number)),
            rows: Vec::new(),
        };
        workers.spawn(worker.run(start, claimed.clone()));
    }
    let mut transactions = 0;
    while let Some(done) = workers.join_next().await {
        transactions += done??;
    }
    let seconds = start.elapsed().as_secs_f64();
    Ok(Summary {
        changes: load.changes,
        transactions,
        seconds,
        from,
        to: server_time(&observer).await?,
    })
}

async fn server_time(client: &Client) -> anyhow::Result<String> {
    let query = r#"SELECT to_char(clock_timestamp() AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"')"#;
    Ok(client.query_one(query, &[]).await?.get(0))
}

/// Both parts of a row's key, as text.
type Key = (String, String);

struct Statements {
    insert: String,
    update: String,
    update_key: String,
    delete: String,
}

impl Statements {
    fn new(table: &str) -> Self {
        const WHERE: &str = "WHERE trade_id = $1::text::uuid AND traded_at = $2::text::timestamptz";
        const KEY: &str = "RETURNING trade_id::text, traded_at::text";
        Self {
            insert: format!(
                "INSERT INTO {table} (trade_id, symbol, price, quantity, side, traded_at) \
                 VALUES ($1::text::uuid, $2, $3::text::numeric, $4, $5, clock_timestamp()) {KEY}"
            ),
            update: format!("UPDATE {table} SET price = $3::text::numeric, quantity = $4 {WHERE} {KEY}"),
            update_key: format!("UPDATE {table} SET traded_at = clock_timestamp() {WHERE} {KEY}"),
            delete: format!("DELETE FROM {table} {WHERE} {KEY}"),
        }
    }
}

/// One connection and the rows that it alone changes, so that workers never wait for each other's locks.
struct Worker {
    client: Client,
    load: Load,
    statements: Statements,
    random: Rng,
    rows: Vec<Key>,
}

impl Worker {
    /// Takes changes until none are left; returns the number of committed transactions.
    async fn run(mut self, start: Instant, claimed: std::sync::Arc<AtomicU64>) -> anyhow::Result<u64> {
        let mut transactions = 0;
        loop {
            let size = self.transaction_size();
            let first = claimed.fetch_add(size, Ordering::Relaxed);
            if first >= self.load.changes {
                return Ok(transactions);
            }
            if self.load.rate > 0.0 {
                let due = start + Duration::from_secs_f64(first as f64 / self.load.rate);
                tokio::time::sleep_until(due.into()).await;
            }
            self.transaction(size.min(self.load.changes - first))
                .await
                .context("a change failed")?;
            transactions += 1;
        }
    }

    fn transaction_size(&mut self) -> u64 {
        match self.random.u32(..100) {
            0..80 => 1,
            80..98 => self.random.u64(2..=8),
            _ => self.random.u64(9..=40),
        }
    }

    /// Commits this many changes; now and then some others are made and rolled back before or in between.
    async fn transaction(&mut self, changes: u64) -> anyhow::Result<()> {
        let Self {
            client,
            load,
            statements,
            random,
            rows,
        } = self;
        if random.u32(..100) < 3 {
            let transaction = client.transaction().await?;
            roll_back_some(&transaction, statements, random, rows).await?;
            transaction.rollback().await?;
        }
        let mut transaction = client.transaction().await?;
        for _ in 0..changes {
            if random.u32(..100) < 3 {
                let savepoint = transaction.transaction().await?;
                roll_back_some(&savepoint, statements, random, rows).await?;
                savepoint.rollback().await?;
            }
            change(&transaction, statements, random, rows, load.key_changes).await?;
        }
        Ok(transaction.commit().await?)
    }
}

/// Makes changes that will be rolled back: the caller's rows stay what they are.
async fn roll_back_some(
    transaction: &Transaction<'_>,
    statements: &Statements,
    random: &mut Rng,
    rows: &[Key],
) -> anyhow::Result<()> {
    let mut doomed = rows.iter().rev().take(3).cloned().collect();
    for _ in 0..random.u32(1..=3) {
        change(transaction, statements, random, &mut doomed, true).await?;
    }
    Ok(())
}

/// Makes one change: seven of ten are inserts, two updates, one a delete.
async fn change(
    transaction: &Transaction<'_>,
    statements: &Statements,
    random: &mut Rng,
    rows: &mut Vec<Key>,
    key_changes: bool,
) -> anyhow::Result<()> {
    let quantity = random.i32(1..=1000);
    let price = format!("{}.{:02}", random.u32(1..=9999), random.u32(..100));
    let operation = random.u32(..100);
    if operation < 70 || rows.is_empty() {
        let id = format!("{:032x}", random.u128(..));
        let symbol = random
            .choice(["ACME", "GLOB", "INIT", "UMBR", "WAYN", "ÅNGS"])
            .unwrap_or_default();
        let side = if random.bool() { "buy" } else { "sell" };
        let row = transaction
            .query_one(&statements.insert, &[&id, &symbol, &price, &quantity, &side])
            .await?;
        rows.push((row.get(0), row.get(1)));
        return Ok(());
    }
    let index = random.usize(..rows.len());
    let (id, time) = &rows[index];
    let changed = if operation >= 90 {
        transaction.query(&statements.delete, &[id, time]).await?
    } else if key_changes && random.u32(..100) < 20 {
        transaction.query(&statements.update_key, &[id, time]).await?
    } else {
        transaction
            .query(&statements.update, &[id, time, &price, &quantity])
            .await?
    };
    ensure!(changed.len() == 1, "the row {id} {time} was changed by somebody else");
    if operation >= 90 {
        rows.swap_remove(index);
    } else {
        rows[index] = (changed[0].get(0), changed[0].get(1));
    }
    Ok(())
}
