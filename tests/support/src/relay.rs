//! The network between a client and a server, which can be broken.

use std::{net::SocketAddr, time::Duration};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{
        TcpListener, TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::watch,
};

/// What becomes of what is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// It arrives.
    Open,
    /// Each piece of up to 64 KiB takes so long, in each direction.
    Slow(Duration),
    /// Nothing arrives, and nobody is told: a partition. What was sent meanwhile arrives when it is over.
    Silent,
}

#[derive(Clone, Copy)]
struct State {
    way: Way,
    target: SocketAddr,
    /// Connections of an earlier one are closed.
    generation: u64,
}

/// Listens on a port of its own, and carries connections to a server.
pub struct Relay {
    address: SocketAddr,
    state: watch::Sender<State>,
}

impl Relay {
    /// From this address to this server.
    ///
    /// # Panics
    /// When the address is taken.
    pub async fn to(address: SocketAddr, target: SocketAddr) -> Self {
        let listener = TcpListener::bind(address).await.unwrap();
        let state = watch::Sender::new(State {
            way: Way::Open,
            target,
            generation: 0,
        });
        tokio::spawn(accept(listener, state.subscribe()));
        Self { address, state }
    }

    /// The port that it listens on.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.address.port()
    }

    /// From now on.
    pub fn set(&self, way: Way) {
        self.state.send_modify(|state| state.way = way);
    }

    /// Closes every connection; new ones are taken.
    pub fn reset(&self) {
        self.state.send_modify(|state| state.generation += 1);
    }

    /// Leads to another server from now on.
    pub fn lead_to(&self, target: SocketAddr) {
        self.state.send_modify(|state| {
            state.target = target;
            state.generation += 1;
        });
    }
}

async fn accept(listener: TcpListener, state: watch::Receiver<State>) {
    while let Ok((client, _)) = listener.accept().await {
        tokio::spawn(carry(client, state.clone()));
    }
}

/// One connection, until one side ends it or it is reset. When it is dropped, both sides see its end.
async fn carry(client: TcpStream, mut state: watch::Receiver<State>) {
    let State { target, generation, .. } = *state.borrow();
    let over = state.clone();
    let connected = async {
        state.wait_for(|state| state.way != Way::Silent).await.ok()?;
        let server = TcpStream::connect(target).await.ok()?;
        client.set_nodelay(true).ok()?;
        server.set_nodelay(true).ok()?;
        let ((from_client, to_client), (from_server, to_server)) = (client.into_split(), server.into_split());
        tokio::join!(
            pump(from_client, to_server, state.clone()),
            pump(from_server, to_client, state.clone())
        );
        Some(())
    };
    let reset = async {
        let mut over = over;
        let _ = over.wait_for(|state| state.generation != generation).await;
    };
    tokio::select! {
        _ = connected => {}
        () = reset => {}
    }
}

/// One direction. That it ended is told to the other side as its own end was.
async fn pump(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, mut state: watch::Receiver<State>) {
    let mut piece = vec![0; 64 << 10];
    while let Ok(length @ 1..) = from.read(&mut piece).await {
        let Ok(way) = state
            .wait_for(|state| state.way != Way::Silent)
            .await
            .map(|state| state.way)
        else {
            return;
        };
        if let Way::Slow(delay) = way {
            tokio::time::sleep(delay).await;
        }
        if to.write_all(&piece[..length]).await.is_err() {
            return;
        }
    }
}
