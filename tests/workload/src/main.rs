//! See the crate `meander_workload`.

use std::{fs, net::SocketAddr, path::PathBuf};

use anyhow::Context as _;
use clap::{Args, Parser, Subcommand};
use meander_workload::{
    load::{self, Load},
    receive, subscribe,
};
use tokio_postgres::Config;

/// Makes changes that can be checked, and receives replays.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Create the table and the ledger where they are missing, and note all changes to the table from now on
    Prepare {
        #[command(flatten)]
        target: Target,
    },
    /// Prepare, then insert, update and delete; ends with a line of JSON
    Load {
        #[command(flatten)]
        target: Target,
        /// Committed changes to make
        #[arg(long, default_value_t = 10_000)]
        changes: u64,
        /// Changes per second; 0 is as fast as it goes
        #[arg(long, default_value_t = 0.0)]
        rate: f64,
        /// Decides what is done
        #[arg(long, default_value_t = 1)]
        seed: u64,
        /// Connections that work at the same time
        #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u64).range(1..))]
        clients: u64,
        /// Change the key in some of the updates
        #[arg(long)]
        key_changes: bool,
    },
    /// Serve meander.v1.ReplayReceiver and judge what arrives; each replay ends with a line of JSON
    Receive {
        /// Where to listen
        #[arg(long, default_value = "0.0.0.0:50051")]
        listen: SocketAddr,
        /// The speed at which the replay is meant to come
        #[arg(long)]
        speed: Option<f64>,
    },
    /// Take a replay from meander.v1.Replayer, and note each message in a file; started again, it goes on after the last one there
    Subscribe {
        /// http://host:port
        #[arg(long)]
        endpoint: String,
        /// File that holds the token to show
        #[arg(long)]
        token_file: PathBuf,
        /// Where each message becomes a line of JSON
        #[arg(long)]
        ledger: PathBuf,
        /// Messages that may be under way
        #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..))]
        credit: u32,
    },
}

#[derive(Args)]
struct Target {
    /// postgres://user@host:port/database
    #[arg(long, env = "DATABASE_URL", hide_env_values = true)]
    database_url: Config,
    /// The password, if the URL has none
    #[arg(long, env = "PGPASSWORD", hide_env_values = true)]
    password: Option<String>,
    /// File that holds the password
    #[arg(long, conflicts_with = "password")]
    password_file: Option<PathBuf>,
    /// The table
    #[arg(long, default_value = "public.trades")]
    table: String,
}

impl Target {
    fn config(&self) -> anyhow::Result<Config> {
        let mut config = self.database_url.clone();
        if let Some(password) = &self.password {
            config.password(password);
        }
        if let Some(file) = &self.password_file {
            let password = fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))?;
            config.password(password.trim_end_matches(['\r', '\n']));
        }
        Ok(config)
    }
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    match Arguments::parse().command {
        Command::Prepare { target } => load::prepare(&load::connect(&target.config()?).await?, &target.table).await,
        Command::Load {
            target,
            changes,
            rate,
            seed,
            clients,
            key_changes,
        } => {
            let config = target.config()?;
            load::prepare(&load::connect(&config).await?, &target.table).await?;
            let load = Load {
                table: target.table,
                changes,
                rate,
                seed,
                clients,
                key_changes,
            };
            println!("{}", serde_json::to_string(&load::run(&config, &load).await?)?);
            Ok(())
        }
        Command::Receive { listen, speed } => receive::serve(listen, speed).await,
        Command::Subscribe {
            endpoint,
            token_file,
            ledger,
            credit,
        } => subscribe::run(&endpoint, &token_file, &ledger, credit).await,
    }
}
