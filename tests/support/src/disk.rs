//! Disks that can be made full: each service keeps its files on a file system of its own, in memory, whose size can be changed.
//!
//! Only root may mount, and a mount outlives whoever made it, so this is for a process in a mount namespace of its own
//! (`unshare --mount`), with which it goes away.

use std::{
    path::Path,
    process::Command,
    sync::atomic::{AtomicBool, Ordering},
};

/// A limit against mistakes; nothing comes near it.
const SIZE: &str = "4g";
/// To make a disk full that is being written to.
const ATTEMPTS: usize = 50;
static LIMITED: AtomicBool = AtomicBool::new(false);

/// Each service that starts from now on has a disk of its own.
pub fn limit() {
    LIMITED.store(true, Ordering::Relaxed);
}

/// Where a service is about to keep its files.
pub(crate) fn give(folder: &Path) {
    if LIMITED.load(Ordering::Relaxed) {
        mount(&["-t", "tmpfs", "-o", &format!("size={SIZE},mode=755"), "none"], folder).unwrap();
    }
}

/// Takes away what is free on the disk of these files, once [`limit`] was called.
///
/// # Panics
/// When they have no disk of their own.
pub fn fill(folder: &Path) {
    let mut result = Ok(());
    // What is written between the look and the change makes it fail: a disk cannot be smaller than what is on it.
    for _ in 0..ATTEMPTS {
        let used = Command::new("df")
            .args(["--output=used", "-k"])
            .arg(folder)
            .output()
            .unwrap();
        let used = String::from_utf8_lossy(&used.stdout);
        let used = used.lines().last().unwrap_or_default().trim();
        result = mount(&["-o", &format!("remount,size={used}k")], folder);
        if result.is_ok() {
            return;
        }
    }
    result.unwrap();
}

/// Gives it back.
///
/// # Panics
/// When they have no disk of their own.
pub fn free(folder: &Path) {
    mount(&["-o", &format!("remount,size={SIZE}")], folder).unwrap();
}

fn mount(arguments: &[&str], folder: &Path) -> Result<(), String> {
    let output = Command::new("mount").args(arguments).arg(folder).output().unwrap();
    if output.status.success() {
        Ok(())
    } else {
        Err(String::from_utf8_lossy(&output.stderr).into_owned())
    }
}
