//! Puts the CNI plugin on the node and keeps it there (C72, C73): the binary, a way to the API server for it, and its entry in the
//! configuration of the CNI that the node has.

use std::fs;
use std::io::Write;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use culvert_runtime::readiness::Task as Pending;
use serde_json::json;

use super::metrics::AgentMetrics;
use super::{KubernetesConfig, conflist};
use crate::cni::{PLUGIN, PluginConfig};

/// What is on the node is compared with what should be this often; files are repaired at most once in so much time (C73).
const LOOK: Duration = Duration::from_secs(1);
/// A configuration is some KiB.
const MAX_CONF: u64 = 1024 * 1024;

/// See the module.
#[derive(Clone, Debug)]
pub struct Installer {
    program: PathBuf,
    binary: PathBuf,
    conf_dir: PathBuf,
    kubeconfig: PathBuf,
    account: PathBuf,
    server: String,
    plugin: PluginConfig,
}

/// What a look at the node found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// All is there.
    Same,
    /// Something was written.
    Written,
    /// There is no CNI on the node yet.
    NoPrimary,
}

impl Installer {
    /// Nothing is written yet. The program that is installed is the one that runs.
    ///
    /// # Errors
    /// The running program cannot be found.
    pub fn new(config: &KubernetesConfig, exclude_namespaces: &[String]) -> anyhow::Result<Self> {
        let host = match config.api_host.contains(':') {
            true => format!("[{}]", config.api_host),
            false => config.api_host.clone(),
        };
        let kubeconfig = config.run_dir.join("culvert-cni-kubeconfig");
        Ok(Self {
            program: std::env::current_exe().context("finding the running program")?,
            binary: config.cni_bin_dir.join(PLUGIN),
            conf_dir: config.cni_conf_dir.clone(),
            kubeconfig: kubeconfig.clone(),
            account: config.account_dir.clone(),
            server: format!("https://{host}:{}", config.api_port),
            plugin: PluginConfig {
                kind: PLUGIN.to_owned(),
                event_socket: config.event_socket(),
                kubeconfig,
                exclude_namespaces: exclude_namespaces.to_vec(),
                system_namespace: config.system_namespace.clone(),
                own_pods: vec!["culvert-agent-".to_owned(), "ztunnel-".to_owned()],
            },
        })
    }

    /// Installs, and repairs for ever. `pending` is done when all is there for the first time.
    pub async fn run(self, pending: Pending, metrics: AgentMetrics) {
        let mut pending = Some(pending);
        let mut said = String::new();
        loop {
            let state = self.ensure();
            metrics.install_ready(matches!(state, Ok(State::Same | State::Written)));
            let problem = match &state {
                Ok(State::NoPrimary) => format!("no CNI configuration in {} yet", self.conf_dir.display()),
                Err(error) => format!("{error:#}"),
                Ok(_) => String::new(),
            };
            match state {
                Ok(State::Written) => {
                    metrics.installed(true);
                    tracing::info!(binary = %self.binary.display(), "the CNI plugin is installed");
                }
                Err(_) if problem != said => metrics.installed(false),
                _ => {}
            }
            if !problem.is_empty() && problem != said {
                tracing::warn!(problem, "the CNI plugin is not installed; trying again");
            }
            if problem.is_empty()
                && let Some(pending) = pending.take()
            {
                pending.done();
            }
            said = problem;
            tokio::time::sleep(LOOK).await;
        }
    }

    /// The entry last: it needs the other two.
    fn ensure(&self) -> anyhow::Result<State> {
        let mut written = self.ensure_binary()?;
        written |= write_if_other(&self.kubeconfig, self.kubeconfig()?.as_bytes(), 0o600)?;
        let Some(path) = self.primary()? else { return Ok(State::NoPrimary) };
        let text = read(&path)?;
        let with = conflist::append(&text, &serde_json::to_value(&self.plugin)?)
            .with_context(|| format!("in {}", path.display()))?;
        if with != text {
            let list = path.with_extension("conflist");
            write_if_other(&list, with.as_bytes(), 0o644)?;
            if list != path {
                // A single plugin's file would be read before the list that stands for it now.
                fs::remove_file(&path).with_context(|| format!("removing {}", path.display()))?;
            }
            written = true;
        }
        Ok(if written { State::Written } else { State::Same })
    }

    /// By size and age: reading two binaries each second would be dear.
    fn ensure_binary(&self) -> anyhow::Result<bool> {
        let ours = fs::metadata(&self.program).context("looking at the running program")?;
        if let Ok(there) = fs::metadata(&self.binary)
            && there.len() == ours.len()
            && there.permissions().mode() & 0o111 == 0o111
            && there.modified().ok() == ours.modified().ok()
        {
            return Ok(false);
        }
        let temporary = self.binary.with_extension("tmp");
        fs::copy(&self.program, &temporary).with_context(|| format!("writing {}", temporary.display()))?;
        fs::set_permissions(&temporary, fs::Permissions::from_mode(0o755))?;
        fs::File::options().write(true).open(&temporary)?.set_modified(ours.modified()?)?;
        fs::rename(&temporary, &self.binary).with_context(|| format!("writing {}", self.binary.display()))?;
        Ok(true)
    }

    fn kubeconfig(&self) -> anyhow::Result<String> {
        let token = read(&self.account.join("token"))?;
        let ca = read(&self.account.join("ca.crt"))?;
        // JSON is YAML.
        let config = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "culvert",
            "clusters": [{"name": "culvert", "cluster": {"server": self.server, "certificate-authority-data": STANDARD.encode(ca)}}],
            "users": [{"name": "culvert", "user": {"token": token.trim()}}],
            "contexts": [{"name": "culvert", "context": {"cluster": "culvert", "user": "culvert"}}],
        });
        Ok(config.to_string())
    }

    /// The file that the runtime reads: the first by name that is a configuration.
    fn primary(&self) -> anyhow::Result<Option<PathBuf>> {
        Ok(self.files()?.into_iter().find(|path| read(path).is_ok_and(|text| conflist::is_primary(&text))))
    }

    fn files(&self) -> anyhow::Result<Vec<PathBuf>> {
        let listing =
            fs::read_dir(&self.conf_dir).with_context(|| format!("listing {}", self.conf_dir.display()))?;
        let is_conf = |path: &PathBuf| {
            path.extension().is_some_and(|it| ["conf", "conflist", "json"].iter().any(|name| it == *name))
        };
        let mut files: Vec<PathBuf> = listing.flatten().map(|it| it.path()).filter(is_conf).collect();
        files.sort();
        Ok(files)
    }

    /// Takes everything away: the entry first, since it needs the other two (C79). Goes on past what cannot be removed.
    pub fn remove(&self) {
        for path in self.files().unwrap_or_default() {
            let outcome = read(&path).and_then(|text| match conflist::remove(&text)? {
                Some(without) => write_if_other(&path, without.as_bytes(), 0o644).map(drop),
                None => Ok(()),
            });
            if let Err(error) = outcome {
                tracing::warn!(file = %path.display(), error = format!("{error:#}"), "CNI configuration cannot be cleaned");
            }
        }
        for path in [&self.binary, &self.kubeconfig, &self.plugin.event_socket] {
            if let Err(error) = fs::remove_file(path) {
                tracing::debug!(file = %path.display(), %error, "cannot be removed");
            }
        }
    }
}

fn read(path: &Path) -> anyhow::Result<String> {
    let length = fs::metadata(path).with_context(|| format!("reading {}", path.display()))?.len();
    anyhow::ensure!(length <= MAX_CONF, "{} has {length} bytes, more than {MAX_CONF}", path.display());
    fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))
}

/// Whole or not at all. Nobody sees it with other rights than `mode`.
fn write_if_other(path: &Path, bytes: &[u8], mode: u32) -> anyhow::Result<bool> {
    let same_mode = |it: fs::Metadata| it.permissions().mode() & 0o777 == mode;
    if fs::metadata(path).is_ok_and(same_mode) && fs::read(path).is_ok_and(|old| old == bytes) {
        return Ok(false);
    }
    let temporary = path.with_extension("culvert-tmp");
    let write = || -> std::io::Result<()> {
        let mut file =
            fs::File::options().write(true).create(true).truncate(true).mode(mode).open(&temporary)?;
        file.set_permissions(fs::Permissions::from_mode(mode))?;
        file.write_all(bytes)?;
        fs::rename(&temporary, path)
    };
    write().with_context(|| format!("writing {}", path.display()))?;
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONF: &str = r#"{"cniVersion":"1.0.0","name":"k","plugins":[{"type":"bridge"}]}"#;

    fn node() -> (tempfile::TempDir, Installer) {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        for name in ["bin", "net.d", "run", "account"] {
            fs::create_dir(at(name)).unwrap();
        }
        fs::write(at("account/token"), "secret").unwrap();
        fs::write(at("account/ca.crt"), "ca").unwrap();
        let config = KubernetesConfig {
            cni_bin_dir: at("bin"),
            cni_conf_dir: at("net.d"),
            run_dir: at("run"),
            account_dir: at("account"),
            api_host: "fd00::1".into(),
            ..KubernetesConfig::default()
        };
        let mut installer = Installer::new(&config, &[]).unwrap();
        installer.program = at("program");
        fs::write(&installer.program, "#!").unwrap();
        (dir, installer)
    }

    /// C72, C73, C79, C82.
    #[test]
    fn the_plugin_is_installed_repaired_and_removed() {
        let (dir, installer) = node();
        assert_eq!(installer.ensure().unwrap(), State::NoPrimary);
        let conf = dir.path().join("net.d/10-k.conflist");
        fs::write(dir.path().join("net.d/05-broken.conflist"), "{").unwrap();
        fs::write(&conf, CONF).unwrap();
        assert_eq!(installer.ensure().unwrap(), State::Written);
        assert!(fs::read_to_string(&conf).unwrap().contains(PLUGIN));
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&installer.binary), mode(&installer.kubeconfig)), (0o755, 0o600));
        let kubeconfig = fs::read_to_string(&installer.kubeconfig).unwrap();
        assert!(kubeconfig.contains("https://[fd00::1]:443") && kubeconfig.contains("secret"));
        assert_eq!(installer.ensure().unwrap(), State::Same);
        type Fault = (&'static str, fn(&Installer, &Path));
        let faults: [Fault; 5] = [
            ("binary", |it, _| fs::remove_file(&it.binary).unwrap()),
            ("other binary", |it, _| fs::write(&it.binary, "other").unwrap()),
            ("kubeconfig", |it, _| fs::remove_file(&it.kubeconfig).unwrap()),
            ("token", |it, _| fs::write(it.account.join("token"), "next").unwrap()),
            ("entry", |_, conf| fs::write(conf, CONF).unwrap()),
        ];
        for (name, fault) in faults {
            fault(&installer, &conf);
            assert_eq!(installer.ensure().unwrap(), State::Written, "{name}");
            assert_eq!(installer.ensure().unwrap(), State::Same, "{name}");
        }
        installer.remove();
        assert!(!fs::read_to_string(&conf).unwrap().contains(PLUGIN));
        assert!(!installer.binary.exists() && !installer.kubeconfig.exists());
    }

    /// C72.
    #[test]
    fn a_single_plugins_file_gives_way_to_a_list() {
        let (dir, installer) = node();
        let conf = dir.path().join("net.d/10-k.conf");
        fs::write(&conf, r#"{"cniVersion":"0.4.0","name":"k","type":"bridge"}"#).unwrap();
        assert_eq!(installer.ensure().unwrap(), State::Written);
        assert!(!conf.exists());
        assert_eq!(installer.ensure().unwrap(), State::Same);
    }
}
