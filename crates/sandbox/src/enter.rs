//! What runs inside the helper between fork and exec: enters a pod and becomes the command.
//!
//! The workspace allows no `unsafe`, and code between fork and exec is exactly that. So the program starts itself again
//! with a hidden subcommand; that process has one thread, enters the namespaces by ordinary calls and then execs.

use std::convert::Infallible;
use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};

use crate::cluster::Key;
use crate::state::StateDir;

/// Name of the hidden subcommand.
pub const SUBCOMMAND: &str = "internal-exec";

/// Where a command runs and what it sees.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Place {
    /// Its network namespace.
    pub netns: PathBuf,
    /// Files shown in place of the machine's own: (ours, where). A place that the machine lacks is left out.
    pub show: Vec<(PathBuf, PathBuf)>,
    /// Mount points taken out of its sight, such as the other namespaces.
    pub hide: Vec<PathBuf>,
    /// Host name; `None` keeps the machine's.
    pub hostname: Option<String>,
    /// Working directory.
    pub cwd: Option<PathBuf>,
}

/// Why the command did not start.
#[derive(Debug, thiserror::Error)]
pub enum EnterError {
    /// A namespace or mount was refused.
    #[error("cannot {what} {path}: {source}", path = path.display())]
    Enter {
        /// The action.
        what: &'static str,
        /// Where.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// Nothing to run.
    #[error("no command")]
    NoCommand,
    /// The program could not be executed.
    #[error("cannot run {program}: {source}", program = program.display())]
    Exec {
        /// The program.
        program: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
}

impl Place {
    /// Where the commands of a pod run: in its namespace, with the cluster's resolver and its own host name, without sight
    /// of the other namespaces.
    pub fn of_pod(state: &StateDir, pod: &Key, netns: &Path) -> Place {
        let dir = state.pod(&pod.namespace, &pod.name);
        Place {
            netns: netns.to_owned(),
            show: vec![
                (dir.join("resolv.conf"), "/etc/resolv.conf".into()),
                (dir.join("hosts"), "/etc/hosts".into()),
                (state.nsswitch(), "/etc/nsswitch.conf".into()),
            ],
            hide: vec![state.netns()],
            // The kernel's limit is 64, a DNS label's 63.
            hostname: Some(pod.name.chars().take(63).collect()),
            cwd: None,
        }
    }

    /// The arguments that make [`SUBCOMMAND`] enter this place and run `command`.
    pub fn arguments<S: Into<OsString>>(&self, command: impl IntoIterator<Item = S>) -> Vec<OsString> {
        let mut arguments: Vec<OsString> =
            vec![SUBCOMMAND.into(), "--netns".into(), self.netns.clone().into()];
        for (ours, target) in &self.show {
            let mut pair = ours.clone().into_os_string();
            pair.push(":");
            pair.push(target);
            arguments.extend(["--show".into(), pair]);
        }
        for path in &self.hide {
            arguments.extend(["--hide".into(), path.clone().into()]);
        }
        if let Some(name) = &self.hostname {
            arguments.extend(["--hostname".into(), name.into()]);
        }
        if let Some(cwd) = &self.cwd {
            arguments.extend(["--cwd".into(), cwd.clone().into()]);
        }
        arguments.push("--".into());
        arguments.extend(command.into_iter().map(Into::into));
        arguments
    }

    /// Enters this place for good. The process must have a single thread.
    pub fn enter(&self) -> Result<(), EnterError> {
        let netns = File::open(&self.netns).map_err(failed("open namespace", &self.netns))?;
        setns(netns, CloneFlags::CLONE_NEWNET).map_err(errno("enter namespace", &self.netns))?;
        if let Some(name) = &self.hostname {
            unshare(CloneFlags::CLONE_NEWUTS).map_err(errno("set host name to", Path::new(name)))?;
            nix::unistd::sethostname(name).map_err(errno("set host name to", Path::new(name)))?;
        }
        if !self.show.is_empty() || !self.hide.is_empty() {
            self.arrange_mounts()?;
        }
        Ok(())
    }

    /// [`Place::enter`], then becomes `command`, with `environment` instead of the process's own if given. Returns only on
    /// failure.
    pub fn exec_with(
        &self,
        command: &[OsString],
        environment: Option<Vec<(OsString, OsString)>>,
    ) -> Result<Infallible, EnterError> {
        let [program, arguments @ ..] = command else { return Err(EnterError::NoCommand) };
        self.enter()?;
        let mut command = Command::new(program);
        command.args(arguments);
        if let Some(environment) = environment {
            command.env_clear().envs(environment);
        }
        if let Some(cwd) = &self.cwd {
            command.current_dir(cwd);
        }
        Err(EnterError::Exec { program: program.into(), source: command.exec() })
    }

    fn arrange_mounts(&self) -> Result<(), EnterError> {
        let root = Path::new("/");
        unshare(CloneFlags::CLONE_NEWNS).map_err(errno("leave the mounts of", root))?;
        // Before anything else: what follows must not travel back to the machine's own mounts.
        mount(None::<&str>, root, None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>)
            .map_err(errno("make private", root))?;
        for path in &self.hide {
            match umount2(path, MntFlags::MNT_DETACH) {
                Ok(()) | Err(nix::Error::EINVAL | nix::Error::ENOENT) => {}
                Err(error) => return Err(errno("hide", path)(error)),
            }
        }
        for (ours, target) in self.show.iter().filter(|(_, target)| target.exists()) {
            mount(Some(ours), target, None::<&str>, MsFlags::MS_BIND, None::<&str>)
                .map_err(errno("show a file at", target))?;
        }
        Ok(())
    }
}

impl EnterError {
    /// The exit code a shell would give: 127 not found, 126 not runnable or anything before that.
    pub fn exit_code(&self) -> u8 {
        match self {
            EnterError::Exec { source, .. } if source.kind() == io::ErrorKind::NotFound => 127,
            _ => 126,
        }
    }
}

fn failed<'a>(what: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> EnterError + 'a {
    move |source| EnterError::Enter { what, path: path.to_owned(), source }
}

fn errno<'a>(what: &'static str, path: &'a Path) -> impl FnOnce(nix::Error) -> EnterError + 'a {
    move |error| failed(what, path)(error.into())
}
