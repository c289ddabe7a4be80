//! The ledger that PostgreSQL keeps of the changes to watched tables.

use tokio_postgres::Client;

/// Creates the ledger, where it is missing.
///
/// # Errors
/// What PostgreSQL says.
pub async fn create(client: &Client) -> Result<(), tokio_postgres::Error> {
    client.batch_execute(include_str!("ledger.sql")).await
}

/// Has every change to a table noted from now on. The name is as in SQL.
///
/// # Errors
/// What PostgreSQL says, for example that there is no such table.
pub async fn watch(client: &Client, table: &str) -> Result<(), tokio_postgres::Error> {
    client
        .execute("SELECT meander_ledger.watch($1::text::regclass)", &[&table])
        .await?;
    Ok(())
}
