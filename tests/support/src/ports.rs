//! Free TCP ports on loopback.

use std::{
    net::{Ipv4Addr, SocketAddr, TcpListener},
    sync::{
        OnceLock,
        atomic::{AtomicU16, Ordering},
    },
};

/// Below the ports that the kernel gives to clients: there, a client that retries a port whose service is down can end up
/// connected to itself, and keep the service from coming back. Below Kubernetes' node ports, too.
const RANGE: std::ops::Range<u16> = 10_000..30_000;
/// Ports that one process has to itself.
const BLOCK: u16 = 200;

/// A port that nobody listens on, and no other test program will: one that is given out is not listened on yet, perhaps for seconds.
pub(crate) fn free_port() -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let (_, first) = block();
    (1..BLOCK)
        .map(|_| first + 1 + NEXT.fetch_add(1, Ordering::Relaxed) % (BLOCK - 1))
        .find(|port| TcpListener::bind((Ipv4Addr::LOCALHOST, *port)).is_ok())
        .expect("a free port on loopback")
}

/// This process's block of ports: it is whose that listens on its first port, for as long as it lives.
fn block() -> &'static (TcpListener, u16) {
    static OURS: OnceLock<(TcpListener, u16)> = OnceLock::new();
    OURS.get_or_init(|| {
        let blocks = (RANGE.end - RANGE.start) / BLOCK;
        let start = u16::try_from(std::process::id() % u32::from(blocks)).unwrap();
        (0..blocks)
            .map(|block| RANGE.start + (start + block) % blocks * BLOCK)
            .find_map(|first| Some((TcpListener::bind((Ipv4Addr::LOCALHOST, first)).ok()?, first)))
            .expect("a block of ports that nobody has")
    })
}

/// An address on loopback that nobody listens on, for servers that the test starts itself.
#[must_use]
pub fn free_address() -> SocketAddr {
    (Ipv4Addr::LOCALHOST, free_port()).into()
}
