//! Free TCP ports on loopback.

use std::{
    net::{Ipv4Addr, SocketAddr, TcpListener},
    sync::atomic::{AtomicU16, Ordering},
};

/// Below the ports that the kernel gives to clients: there, a client that retries a port whose service is down can end up
/// connected to itself, and keep the service from coming back. Below Kubernetes' node ports, too.
const RANGE: std::ops::Range<u16> = 10_000..30_000;

/// A port that nobody listens on and that this process has not given out before.
pub(crate) fn free_port() -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let size = RANGE.end - RANGE.start;
    // Processes start at different places, so that two of them seldom try the same port at once.
    let first = u16::try_from(std::process::id().wrapping_mul(251) % u32::from(size)).unwrap();
    (0..size)
        .map(|_| RANGE.start + (first + NEXT.fetch_add(1, Ordering::Relaxed) % size) % size)
        .find(|port| TcpListener::bind((Ipv4Addr::LOCALHOST, *port)).is_ok())
        .expect("a free port on loopback")
}

/// An address on loopback that nobody listens on, for servers that the test starts itself.
#[must_use]
pub fn free_address() -> SocketAddr {
    (Ipv4Addr::LOCALHOST, free_port()).into()
}
