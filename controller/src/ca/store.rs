//! The root on disk: `root/key.pem` (mode 600) and `root/cert.pem` below the given directory.
//!
//! Both are made in a directory beside and moved in place by one rename, so that no crash leaves half a pair. What is
//! there is never replaced: every workload of the mesh trusts it.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::authority::AuthorityError;

const ROOT: &str = "root";
const KEY: &str = "key.pem";
const CERTIFICATE: &str = "cert.pem";
/// An RSA-4096 pair has 6 KiB of PEM.
const MAX_FILE: u64 = 64 * 1024;

/// A key and the certificate over it, PEM.
pub(super) struct Pair {
    pub(super) key: String,
    pub(super) certificate: String,
}

/// The pair that is kept in `dir`, or `make`'s, kept from now on.
pub(super) fn load_or_make(
    dir: &Path,
    make: impl FnOnce() -> Result<Pair, AuthorityError>,
) -> Result<Pair, AuthorityError> {
    let root = dir.join(ROOT);
    if !exists(&root)? {
        DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(failed(dir))?;
        let made = make()?;
        if keep(dir, &root, &made)? {
            tracing::info!(dir = %root.display(), "made a new root certificate");
            return Ok(made);
        }
        // Another controller was quicker: its pair counts.
    }
    load(&root)
}

/// Where the certificate of `dir` lies, for messages.
pub(super) fn certificate_path(dir: &Path) -> PathBuf {
    dir.join(ROOT).join(CERTIFICATE)
}

fn load(root: &Path) -> Result<Pair, AuthorityError> {
    let key = root.join(KEY);
    let mode = fs::metadata(&key).map_err(failed(&key))?.mode() & 0o777;
    if mode & 0o077 != 0 {
        return Err(AuthorityError::KeyMode { path: key, mode });
    }
    Ok(Pair { key: read(&key)?, certificate: read(&root.join(CERTIFICATE))? })
}

/// False if there was a pair already.
fn keep(dir: &Path, root: &Path, pair: &Pair) -> Result<bool, AuthorityError> {
    // The name is free unless this very process, or one before it with its id, died in these lines.
    let new = dir.join(format!("{ROOT}.new-{}", std::process::id()));
    if exists(&new)? {
        fs::remove_dir_all(&new).map_err(failed(&new))?;
    }
    DirBuilder::new().mode(0o700).create(&new).map_err(failed(&new))?;
    write(&new.join(KEY), 0o600, &pair.key)?;
    write(&new.join(CERTIFICATE), 0o644, &pair.certificate)?;
    sync(&new)?;
    // A rename onto a directory that holds something fails, so a pair is never replaced.
    if let Err(error) = fs::rename(&new, root) {
        fs::remove_dir_all(&new).map_err(failed(&new))?;
        return if exists(root)? { Ok(false) } else { Err(failed(root)(error)) };
    }
    sync(dir)?;
    Ok(true)
}

fn exists(path: &Path) -> Result<bool, AuthorityError> {
    path.try_exists().map_err(failed(path))
}

fn read(path: &Path) -> Result<String, AuthorityError> {
    let mut text = String::new();
    let file = File::open(path).map_err(failed(path))?;
    file.take(MAX_FILE).read_to_string(&mut text).map_err(failed(path))?;
    Ok(text)
}

fn write(path: &Path, mode: u32, text: &str) -> Result<(), AuthorityError> {
    let write = || {
        let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(path)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()
    };
    write().map_err(failed(path))
}

fn sync(dir: &Path) -> Result<(), AuthorityError> {
    File::open(dir).and_then(|dir| dir.sync_all()).map_err(failed(dir))
}

fn failed(path: &Path) -> impl FnOnce(io::Error) -> AuthorityError {
    let path = path.to_owned();
    move |source| AuthorityError::File { path, source }
}
