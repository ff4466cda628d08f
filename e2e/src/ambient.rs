//! An ambient node tunnel of another project in place of our proxy: the protocols are the same, the settings have other names.

use std::fs;
use std::io;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// Makes `dir/bin` a directory of programs for `culvert up --bin-dir`: ours, but `ztunnel proxy` runs `peer` on the nodes
/// named, or on every node if none is named. Settings go to it as environment variables (its `src/config.rs`); it takes no flags.
///
/// # Errors
/// A program is missing, or the directory cannot be written.
pub fn programs(dir: &Path, ours: &Path, peer: &Path, nodes: &[&str]) -> Result<PathBuf> {
    let bin = dir.join("bin");
    fs::create_dir_all(&bin)?;
    let peer = fs::canonicalize(peer).with_context(|| format!("no ambient ztunnel at {}", peer.display()))?;
    match symlink(ours.join("controller"), bin.join("controller")) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error.into()),
        _ => {}
    }
    let script = bin.join("ztunnel");
    fs::write(&script, wrapper(&ours.join("ztunnel"), &peer, nodes))?;
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755))?;
    Ok(bin)
}

fn wrapper(ours: &Path, peer: &Path, nodes: &[&str]) -> String {
    let (ours, peer) = (ours.display(), peer.display());
    let nodes = if nodes.is_empty() { "*".to_owned() } else { nodes.join("|") };
    // The node is the first option that the supervisor gives. A resolver's address is IPv4 where there is IPv4.
    format!(
        r#"#!/bin/sh
[ "$1" = proxy ] && [ "$2" = --node ] || exec '{ours}' "$@"
case "$3" in
  {nodes}) ;;
  *) exec '{ours}' "$@" ;;
esac
shift
while [ $# -gt 0 ]; do
  case "$1" in
    --node) export NODE_NAME="$2" ;;
    --node-ip) export INSTANCE_IP="$2" ;;
    --zds-socket) export INPOD_UDS="$2" ;;
    --xds-address) export XDS_ADDRESS="$2" CA_ADDRESS="$2" ;;
    --xds-server-name) export ALT_XDS_HOSTNAME="$2" ALT_CA_HOSTNAME="$2" ;;
    --xds-root-cert) export XDS_ROOT_CA="$2" CA_ROOT_CA="$2" ;;
    --token-file) export AUTH_TOKEN="$2" ;;
    --log-format) export LOG_FORMAT="$2" ;;
    --drain-deadline) export CONNECTION_TERMINATION_DEADLINE="$2" ;;
    --pool-idle) export POOL_UNUSED_RELEASE_TIMEOUT="$2" ;;
    --workers) export ZTUNNEL_WORKER_THREADS="$2" ;;
    --dns-upstream) resolver="${{2%:*}}" ;;
    *) echo "no counterpart of $1" >&2; exit 2 ;;
  esac
  shift 2
done
export POD_NAME=ztunnel POD_NAMESPACE=culvert-system SERVICE_ACCOUNT=ztunnel
# It reads the machine's resolv.conf: it is shown one of its own, in a mount namespace that nobody else sees.
echo "nameserver $resolver" > "$0.$NODE_NAME.conf"
exec unshare --mount sh -c 'mount --bind "$0" /etc/resolv.conf && exec "$@"' "$0.$NODE_NAME.conf" '{peer}' proxy
"#
    )
}
