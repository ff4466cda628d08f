//! The bearer token that proves this node to the controller.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use tonic::metadata::{Ascii, MetadataValue};

/// Largest token, bytes. A bound Kubernetes token has about 1 KiB; header lists are limited to 16 KiB.
pub const MAX_TOKEN: u64 = 8 * 1024;

/// A file that holds a token. It is read anew for each call, since what rotates it (kubelet) tells nobody.
#[derive(Debug)]
pub struct TokenFile {
    path: PathBuf,
    warned: AtomicBool,
}

/// Why there is no token. None quotes the token.
#[derive(Debug, thiserror::Error)]
pub enum TokenError {
    /// The file cannot be read.
    #[error("cannot read the token file {path}: {source}")]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The file holds nothing.
    #[error("the token file {0} is empty")]
    Empty(PathBuf),
    /// The file is larger than [`MAX_TOKEN`].
    #[error("the token file {0} has more than {MAX_TOKEN} bytes")]
    TooLarge(PathBuf),
    /// The file holds what cannot stand in a header.
    #[error("the token file {0} holds a character that cannot be part of a token")]
    NotAToken(PathBuf),
}

impl TokenFile {
    /// Names the file; nothing is read yet.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into(), warned: AtomicBool::new(false) }
    }

    /// Which file.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The value of the `authorization` header: `Bearer <token>`, marked as sensitive so that no log shows it. Reads a small
    /// local file, which is quick enough for an async caller.
    ///
    /// A file that others may read is used all the same, with one warning: in Kubernetes its mode is not ours to choose.
    ///
    /// # Errors
    /// [`TokenError`] names the file and what is wrong with it.
    pub fn authorization(&self) -> Result<MetadataValue<Ascii>, TokenError> {
        let failed = |source| TokenError::Read { path: self.path.clone(), source };
        let file = File::open(&self.path).map_err(failed)?;
        let mode = file.metadata().map_err(failed)?.mode();
        if mode & 0o077 != 0 && !self.warned.swap(true, Ordering::Relaxed) {
            let mode = format!("{:o}", mode & 0o777);
            tracing::warn!(file = %self.path.display(), mode, "the token file can be read by others; it should have mode 600");
        }
        let mut text = Vec::new();
        file.take(MAX_TOKEN + 1).read_to_end(&mut text).map_err(failed)?;
        if text.len() as u64 > MAX_TOKEN {
            return Err(TokenError::TooLarge(self.path.clone()));
        }
        let token = text.trim_ascii();
        if token.is_empty() {
            return Err(TokenError::Empty(self.path.clone()));
        }
        let value = [b"Bearer ", token].concat();
        let graphic = token.iter().all(u8::is_ascii_graphic);
        let value = MetadataValue::try_from(value.as_slice()).ok().filter(|_| graphic);
        let mut value = value.ok_or_else(|| TokenError::NotAToken(self.path.clone()))?;
        value.set_sensitive(true);
        Ok(value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_read_anew_trimmed_and_bounded() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("token");
        let token = TokenFile::new(&path);
        assert!(matches!(token.authorization(), Err(TokenError::Read { .. })));
        std::fs::write(&path, "abc\n").unwrap();
        let value = token.authorization().unwrap();
        assert_eq!(value, "Bearer abc");
        assert!(!format!("{value:?}").contains("abc"));
        std::fs::write(&path, "def").unwrap();
        assert_eq!(token.authorization().unwrap(), "Bearer def");
        std::fs::write(&path, " \n").unwrap();
        assert!(matches!(token.authorization(), Err(TokenError::Empty(_))));
        for bad in ["a b", "a\nb", "caf\u{e9}"] {
            std::fs::write(&path, bad).unwrap();
            assert!(matches!(token.authorization(), Err(TokenError::NotAToken(_))), "{bad:?}");
        }
        std::fs::write(&path, vec![b'a'; MAX_TOKEN as usize + 1]).unwrap();
        assert!(matches!(token.authorization(), Err(TokenError::TooLarge(_))));
    }
}
