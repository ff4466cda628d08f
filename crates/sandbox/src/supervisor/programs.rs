//! Nodes and the mesh's programs on them.

use tokio::sync::{mpsc, oneshot};

use super::{Daemon, Event, RESTARTS, Supervisor, SupervisorError};
use crate::control::Reply;
use crate::daemon::{self, DaemonSpec, DaemonState, Role};
use crate::state::{self, MAX_NODE_NAME};

impl Supervisor {
    /// Makes a node with its programs unless it exists.
    pub(super) fn ensure_node(&mut self, name: &str) -> Result<(), SupervisorError> {
        if self.lab.node(name).is_some() {
            return Ok(());
        }
        if name.len() > MAX_NODE_NAME {
            return Err(SupervisorError::NodeName { node: name.to_owned() });
        }
        let node = self.lab.add_node(name)?.clone();
        let redirection = self.options.state.node(name).join("redirection");
        std::fs::create_dir_all(&redirection).map_err(state::io_error("create", &redirection))?;
        tracing::info!(node = name, addresses = ?node.addresses, "made");
        if self.system.is_some() {
            // No pod has an underscore in its key.
            let [first, second] = [0, 1].map(|slot| self.new_address(&format!("_proxy.{name}.{slot}"), name));
            let namespaces = [first?.1, second?.1];
            let system = self.system.as_ref().expect("checked above");
            system.admit(name)?;
            let specs = [system.agent(name, &node), system.proxy(name, &node, namespaces)];
            specs.into_iter().for_each(|spec| self.start_daemon(spec));
        }
        Ok(())
    }

    pub(super) fn start_daemon(&mut self, spec: DaemonSpec) {
        let (restarts, requests) = mpsc::channel(RESTARTS);
        let label = spec.start.label.clone();
        let daemon = Daemon {
            label: label.clone(),
            role: spec.role,
            node: spec.node.clone(),
            log: spec.start.log.clone(),
            state: DaemonState::default(),
            restarts,
        };
        self.daemons.insert(label, daemon);
        let (launcher, stop) = (self.launcher.clone(), self.stop_system.clone());
        let run = daemon::run(spec, launcher, self.tasks.clone(), stop, requests, self.sender.clone());
        self.tasks.spawn("system program", run);
    }

    pub(super) fn restart(&self, role: Role, node: Option<&str>, reply: oneshot::Sender<Reply>) {
        let chosen: Vec<_> = self
            .daemons
            .values()
            .filter(|daemon| daemon.role == role && (node.is_none() || daemon.node.as_deref() == node))
            .collect();
        if chosen.is_empty() {
            let _ = reply.send(Reply::Failed("there is no such program".to_owned()));
            return;
        }
        let mut answers = Vec::new();
        for daemon in chosen {
            let (done, answer) = oneshot::channel();
            if daemon.restarts.try_send(done).is_err() {
                let _ = reply.send(Reply::Failed(format!("{} is being restarted already", daemon.label)));
                return;
            }
            answers.push((daemon.label.clone(), answer));
        }
        let events = self.sender.clone();
        self.tasks.spawn("restart", async move {
            let mut outcome = Reply::Done;
            for (label, answer) in answers {
                match answer.await {
                    Ok(Ok(())) => {}
                    Ok(Err(why)) => outcome = Reply::Failed(format!("{label}: {why}")),
                    Err(_) => outcome = Reply::Failed(format!("{label} was stopped")),
                }
            }
            let _ = events.send(Event::Finished(outcome, reply)).await;
        });
    }
}
