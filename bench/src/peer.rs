//! Another node tunnel in ours's place: the protocols are the same, the settings have other names.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::Context;

/// A directory with our programs, in which `ztunnel proxy` runs `peer` instead.
///
/// # Errors
/// A program is missing, or the directory cannot be written.
pub fn programs(dir: &Path, ours: &Path, peer: &Path) -> anyhow::Result<PathBuf> {
    let bin = dir.join("bin");
    fs::create_dir_all(&bin)?;
    let peer = fs::canonicalize(peer).with_context(|| format!("--peer-ztunnel {}", peer.display()))?;
    let controller = bin.join("controller");
    if !controller.exists() {
        std::os::unix::fs::symlink(ours.join("controller"), &controller)?;
    }
    let script = bin.join("ztunnel");
    fs::write(&script, wrapper(&ours.join("ztunnel"), &peer))?;
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755))?;
    Ok(bin)
}

fn wrapper(ours: &Path, peer: &Path) -> String {
    let (ours, peer) = (ours.display(), peer.display());
    format!(
        r#"#!/bin/sh
[ "$1" = proxy ] || exec '{ours}' "$@"
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
    --dns-upstream) ;;
    *) echo "no counterpart of $1" >&2; exit 2 ;;
  esac
  shift 2
done
export POD_NAME=ztunnel POD_NAMESPACE=culvert-system SERVICE_ACCOUNT=ztunnel
exec '{peer}' proxy
"#
    )
}
