//! Puts the CNI plugin on the node and keeps it there (C72, C73): the binary, a way to the API server for it, and its entry in the
//! configuration of the CNI that the node has.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use culvert_k8s_api::enrolment::Settings;
use culvert_runtime::readiness::Task as Pending;
use notify::{RecursiveMode, Watcher};
use parking_lot::Mutex;
use serde_json::json;
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::metrics::AgentMetrics;
use super::{KubernetesConfig, conflist};
use crate::cni::{PLUGIN, PluginConfig};

/// What is on the node is compared with what should be this often, and when files change; they are repaired at most once in so
/// much time (C73).
const LOOK: Duration = Duration::from_secs(1);
/// Times that the entry is taken out before it is said who may be doing it.
const TAKEN_OUT: u32 = 3;
/// A configuration is some KiB.
const MAX_CONF: u64 = 1024 * 1024;
/// What the mesh itself runs on, by the beginnings of pods' names.
pub const OWN_PODS: [&str; 3] = ["culvert-agent-", "culvert-controller-", "ztunnel-"];

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
    /// The plugin's program as it was when it last had the content that it should have.
    verified: Arc<Mutex<Option<Stamp>>>,
}

/// Device, inode, length, mode, and when anything of it was last changed: a file with the same stamp has the same content.
type Stamp = (u64, u64, u64, u32, i64, i64);

/// What a look at the node found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// All is there.
    Same,
    /// Something was written, but for the entry.
    Written,
    /// The entry was missing or another, and was written.
    Entered,
    /// There is no CNI on the node yet.
    NoPrimary,
}

impl Installer {
    /// Nothing is written yet. The program that is installed is the one that runs.
    ///
    /// # Errors
    /// The running program cannot be found.
    pub fn new(config: &KubernetesConfig, settings: Settings) -> anyhow::Result<Self> {
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
                exclude_namespaces: settings.excluded_namespaces,
                enablement_selectors: settings.enablement,
                system_namespace: settings.system_namespace,
                own_pods: OWN_PODS.map(str::to_owned).to_vec(),
            },
            verified: Arc::default(),
        })
    }

    /// A predecessor has installed the plugin on this node.
    pub fn was_here(&self) -> bool {
        self.binary.exists()
    }

    /// Installs, and repairs for ever. `pending` is done when all is there for the first time.
    pub async fn run(self, pending: Pending, metrics: AgentMetrics) {
        let mut pending = Some(pending);
        let mut said = String::new();
        let mut entered: u32 = 0;
        let mut changes = self.changes();
        loop {
            let looked = Instant::now();
            let state = self.ensure();
            metrics.install_ready(!matches!(state, Err(_) | Ok(State::NoPrimary)));
            let problem = match &state {
                Ok(State::NoPrimary) => format!("no CNI configuration in {} yet", self.conf_dir.display()),
                Err(error) => format!("{error:#}"),
                Ok(_) => String::new(),
            };
            match state {
                Ok(State::Written | State::Entered) => {
                    metrics.installed(true);
                    tracing::info!(binary = %self.binary.display(), "the CNI plugin is installed");
                }
                Err(_) if problem != said => metrics.installed(false),
                _ => {}
            }
            entered += u32::from(matches!(state, Ok(State::Entered)));
            if entered == 1 + TAKEN_OUT && matches!(state, Ok(State::Entered)) {
                tracing::warn!(
                    "another program takes the plugin out of the CNI configuration again and again; with Cilium set cni.exclusive=false"
                );
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
            let wrote = matches!(state, Ok(State::Written | State::Entered));
            let _ = tokio::time::timeout(LOOK, changes.changed()).await;
            if wrote {
                tokio::time::sleep_until(looked + LOOK).await;
            }
        }
    }

    /// Between a change of the configuration and its repair pods start without the plugin: that must not be a second.
    fn changes(&self) -> Changes {
        let (notify, notices) = mpsc::channel(1);
        let watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
            // Reading a file is an event too.
            if event.is_ok_and(|it| !it.kind.is_access()) {
                let _ = notify.try_send(());
            }
        });
        let dirs =
            [Some(&*self.conf_dir), self.binary.parent(), self.kubeconfig.parent(), Some(&*self.account)];
        let watching = watcher.and_then(|mut watcher| {
            for dir in dirs.into_iter().flatten().filter(|it| it.exists()) {
                watcher.watch(dir, RecursiveMode::NonRecursive)?;
            }
            Ok(watcher)
        });
        if let Err(error) = &watching {
            tracing::warn!(%error, "changes of the CNI configuration are noticed within a second only");
        }
        Changes { notices, _watcher: watching.ok() }
    }

    /// The entry last: it needs the other two.
    fn ensure(&self) -> anyhow::Result<State> {
        let mut written = self.ensure_binary()?;
        written |= write_if_other(&self.kubeconfig, self.kubeconfig()?.as_bytes(), 0o600)?;
        let Some(path) = self.primary()? else { return Ok(State::NoPrimary) };
        let text = read(&path)?;
        let with = conflist::append(&text, &serde_json::to_value(&self.plugin)?)
            .with_context(|| format!("in {}", path.display()))?;
        if with == text {
            return Ok(if written { State::Written } else { State::Same });
        }
        let list = path.with_extension("conflist");
        write_if_other(&list, with.as_bytes(), 0o644)?;
        if list != path {
            // A single plugin's file would be read before the list that stands for it now.
            fs::remove_file(&path).with_context(|| format!("removing {}", path.display()))?;
        }
        Ok(State::Entered)
    }

    /// Compared byte for byte when it is not the file that was found to be right before: two builds may have one size and one age.
    fn ensure_binary(&self) -> anyhow::Result<bool> {
        let mut verified = self.verified.lock();
        let there = stamp(&self.binary);
        if there.is_some() && *verified == there {
            return Ok(false);
        }
        let right = there.is_some_and(|it| it.3 & 0o111 == 0o111)
            && is_same(&self.program, &self.binary).context("comparing the plugin's program")?;
        if !right {
            let temporary = self.binary.with_extension("tmp");
            fs::copy(&self.program, &temporary)
                .with_context(|| format!("writing {}", temporary.display()))?;
            fs::set_permissions(&temporary, fs::Permissions::from_mode(0o755))?;
            fs::File::open(&temporary)?.sync_all()?;
            fs::rename(&temporary, &self.binary)
                .with_context(|| format!("writing {}", self.binary.display()))?;
            sync_dir_of(&self.binary)?;
        }
        *verified = stamp(&self.binary);
        Ok(!right)
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

    /// Takes the plugin out of every configuration (C79): pods start without it from now on. Goes on past what cannot be cleaned.
    pub fn remove_entry(&self) {
        for path in self.files().unwrap_or_default() {
            let outcome = read(&path).and_then(|text| match conflist::remove(&text)? {
                Some(without) => write_if_other(&path, without.as_bytes(), 0o644).map(drop),
                None => Ok(()),
            });
            if let Err(error) = outcome {
                tracing::warn!(file = %path.display(), error = format!("{error:#}"), "CNI configuration cannot be cleaned");
            }
        }
    }

    /// Takes the rest away, after the entry, which needs it.
    pub fn remove_rest(&self) {
        let logs = crate::cni::log_files(&self.plugin.event_socket);
        let rest = [&self.binary, &self.kubeconfig, &self.plugin.event_socket].into_iter().chain(&logs);
        for path in rest {
            if let Err(error) = fs::remove_file(path) {
                tracing::debug!(file = %path.display(), %error, "cannot be removed");
            }
        }
    }
}

/// Wakes when a file may have changed.
struct Changes {
    notices: mpsc::Receiver<()>,
    _watcher: Option<notify::RecommendedWatcher>,
}

impl Changes {
    async fn changed(&mut self) {
        if self.notices.recv().await.is_none() {
            std::future::pending::<()>().await;
        }
    }
}

fn stamp(path: &Path) -> Option<Stamp> {
    let it = fs::metadata(path).ok()?;
    Some((it.dev(), it.ino(), it.len(), it.mode(), it.ctime(), it.ctime_nsec()))
}

fn is_same(one: &Path, other: &Path) -> std::io::Result<bool> {
    let (mut one, mut other) = (fs::File::open(one)?, fs::File::open(other)?);
    let mut left = one.metadata()?.len();
    if left != other.metadata()?.len() {
        return Ok(false);
    }
    let (mut a, mut b) = (vec![0; 64 * 1024], vec![0; 64 * 1024]);
    while left > 0 {
        let piece = usize::try_from(left).map_or(a.len(), |it| it.min(a.len()));
        one.read_exact(&mut a[..piece])?;
        other.read_exact(&mut b[..piece])?;
        if a[..piece] != b[..piece] {
            return Ok(false);
        }
        left -= piece as u64;
    }
    Ok(true)
}

/// What was renamed there is still there after a power cut.
fn sync_dir_of(path: &Path) -> std::io::Result<()> {
    match path.parent() {
        Some(dir) => fs::File::open(dir)?.sync_all(),
        None => Ok(()),
    }
}

fn read(path: &Path) -> anyhow::Result<String> {
    let length = fs::metadata(path).with_context(|| format!("reading {}", path.display()))?.len();
    anyhow::ensure!(length <= MAX_CONF, "{} has {length} bytes, more than {MAX_CONF}", path.display());
    fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))
}

/// Whole or not at all, also after a power cut: a node whose plugin is cut off starts no pod, not even the agent that would mend
/// it. Nobody sees it with other rights than `mode`.
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
        file.sync_all()?;
        fs::rename(&temporary, path)?;
        sync_dir_of(path)
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
        let mut installer = Installer::new(&config, Settings::default()).unwrap();
        installer.program = at("program");
        fs::write(&installer.program, "#!").unwrap();
        (dir, installer)
    }

    /// C72, C73, C82.
    #[test]
    fn the_plugin_is_installed_and_repaired() {
        let (dir, installer) = node();
        assert_eq!(installer.ensure().unwrap(), State::NoPrimary);
        let conf = dir.path().join("net.d/10-k.conflist");
        fs::write(dir.path().join("net.d/05-broken.conflist"), "{").unwrap();
        fs::write(&conf, CONF).unwrap();
        assert_eq!(installer.ensure().unwrap(), State::Entered);
        assert!(fs::read_to_string(&conf).unwrap().contains(PLUGIN));
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&installer.binary), mode(&installer.kubeconfig)), (0o755, 0o600));
        let kubeconfig = fs::read_to_string(&installer.kubeconfig).unwrap();
        assert!(kubeconfig.contains("https://[fd00::1]:443") && kubeconfig.contains("secret"));
        assert_eq!(installer.ensure().unwrap(), State::Same);
        type Fault = (&'static str, fn(&Installer, &Path));
        let faults: [Fault; 6] = [
            ("binary", |it, _| fs::remove_file(&it.binary).unwrap()),
            // As long as the right one: another build.
            ("other binary", |it, _| fs::write(&it.binary, "??").unwrap()),
            ("no program", |it, _| {
                fs::set_permissions(&it.binary, fs::Permissions::from_mode(0o644)).unwrap();
            }),
            ("kubeconfig", |it, _| fs::remove_file(&it.kubeconfig).unwrap()),
            ("token", |it, _| fs::write(it.account.join("token"), "next").unwrap()),
            ("entry", |_, conf| fs::write(conf, CONF).unwrap()),
        ];
        for (name, fault) in faults {
            fault(&installer, &conf);
            let expected = if name == "entry" { State::Entered } else { State::Written };
            assert_eq!(installer.ensure().unwrap(), expected, "{name}");
            assert_eq!(installer.ensure().unwrap(), State::Same, "{name}");
        }
    }

    /// C79, H19, TRAP20.
    #[test]
    fn the_entry_goes_before_the_program_that_it_needs() {
        let (dir, installer) = node();
        let conf = dir.path().join("net.d/10-k.conflist");
        fs::write(&conf, CONF).unwrap();
        installer.ensure().unwrap();
        fs::write(&installer.plugin.event_socket, "").unwrap();
        installer.remove_entry();
        let left: serde_json::Value = serde_json::from_str(&fs::read_to_string(&conf).unwrap()).unwrap();
        assert_eq!(left, serde_json::from_str::<serde_json::Value>(CONF).unwrap());
        assert!(installer.binary.exists() && installer.kubeconfig.exists());
        installer.remove_rest();
        for name in ["bin", "run"] {
            let rest: Vec<_> = fs::read_dir(dir.path().join(name)).unwrap().flatten().collect();
            assert!(rest.is_empty(), "{rest:?}");
        }
    }

    /// C73: an entry that is taken out is back long before the next look, and somebody who does it again and again is not chased.
    #[tokio::test]
    async fn a_change_of_the_configuration_is_repaired_when_it_happens() {
        let (dir, installer) = node();
        let conf = dir.path().join("net.d/10-k.conflist");
        let metrics = AgentMetrics::unread();
        let readiness = culvert_runtime::readiness::Readiness::new();
        let pending = readiness.register("installed");
        let tasks = culvert_runtime::tasks::Tasks::new("test");
        tasks.spawn("install", installer.run(pending, metrics));
        let entered = || fs::read_to_string(&conf).is_ok_and(|text| text.contains(PLUGIN));
        let until = async |condition: &dyn Fn() -> bool| {
            let begun = Instant::now();
            while !condition() {
                assert!(begun.elapsed() < Duration::from_secs(10), "it never came");
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            begun.elapsed()
        };
        // The primary comes late.
        fs::write(&conf, CONF).unwrap();
        until(&entered).await;
        until(&|| readiness.pending().is_empty()).await;
        let mut times = Vec::new();
        for _ in 0..3 {
            fs::write(&conf, CONF).unwrap();
            times.push(until(&entered).await);
        }
        // All but the first waited for the second to be over.
        assert!(times.iter().skip(1).all(|it| *it > LOOK / 2), "{times:?}");
        tasks.abort_all();
    }

    /// C72.
    #[test]
    fn a_single_plugins_file_gives_way_to_a_list() {
        let (dir, installer) = node();
        let conf = dir.path().join("net.d/10-k.conf");
        fs::write(&conf, r#"{"cniVersion":"0.4.0","name":"k","type":"bridge"}"#).unwrap();
        assert_eq!(installer.ensure().unwrap(), State::Entered);
        assert!(!conf.exists());
        assert_eq!(installer.ensure().unwrap(), State::Same);
    }
}
