//! One descriptor kept for the moment when there are no more.

use std::fs::File;
use std::io;
use std::sync::{Mutex, PoisonError};

use super::{Acceptor, arm_reset};

/// A descriptor that is given up for a moment, so that a connection that waits can be accepted and reset instead of waiting for
/// nothing. One for the process.
#[derive(Debug)]
pub struct Reserve(Mutex<Option<File>>);

impl Reserve {
    /// Takes a descriptor.
    ///
    /// # Errors
    /// There is none left already.
    pub fn new() -> io::Result<Self> {
        Ok(Self(Mutex::new(Some(spare()?))))
    }

    /// Resets the connection that has waited longest; true if there was one. False too if another thread was quicker to take the
    /// descriptor that was given up: try again later.
    pub fn refuse_one(&self, acceptor: &Acceptor) -> bool {
        // A panic while it was held leaves at worst no descriptor, which is looked at below.
        let mut held = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if held.take().is_none() {
            // It could not be taken back the last time.
            *held = spare().ok();
            return false;
        }
        let refused = match acceptor.try_accept() {
            Ok((stream, _)) => {
                let _ = arm_reset(&stream);
                true
            }
            Err(_) => false,
        };
        *held = spare().ok();
        refused
    }
}

/// Whether a call failed because the process or the machine is out of descriptors or memory: trying again at once would only
/// make it worse.
#[must_use]
pub fn exhausted(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE | libc::ENOBUFS | libc::ENOMEM))
}

fn spare() -> io::Result<File> {
    File::open("/dev/null")
}
