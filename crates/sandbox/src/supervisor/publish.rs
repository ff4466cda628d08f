//! What follows from the pods and services of the moment: service addresses, rules on the nodes, DNS, the report.

use std::sync::Arc;

use culvert_k8s_api::status::ServiceStatus;

use super::Supervisor;
use crate::cluster::{self, Candidate, Key, ServiceView};
use crate::dns::Zone;
use crate::report::{DaemonReport, NodeReport, Report};
use crate::serviceproxy::Rules;
use crate::state;

impl Supervisor {
    /// Recomputes everything that is derived and puts into effect what changed.
    pub(super) fn publish(&mut self) {
        let services = self.services();
        let rules = Rules::new(&services);
        self.apply_rules(&rules);
        let zone = Zone::new(services.iter().flat_map(ServiceView::names));
        self.zone.send_if_modified(|current| {
            let changed = **current != zone;
            if changed {
                *current = Arc::new(zone);
            }
            changed
        });
        let problems = self.problems();
        for problem in problems.iter().filter(|problem| !self.report.problems.contains(problem)) {
            tracing::debug!(problem);
        }
        let settled = self.report.settled || self.settled();
        if settled && !self.report.settled {
            tracing::info!(pods = self.pods.len(), services = services.len(), "everything is up");
        }
        let report = Report {
            supervisor: self.report.supervisor.clone(),
            manifests: self.options.manifests.clone(),
            family: self.options.family,
            mesh: self.system.is_some(),
            settled,
            problems,
            nodes: self
                .lab
                .nodes()
                .map(|(name, node)| NodeReport {
                    name: name.to_owned(),
                    addresses: node.addresses.clone(),
                    netns: node.netns.path().to_owned(),
                })
                .collect(),
            system: self
                .daemons
                .values()
                .map(|daemon| DaemonReport {
                    role: daemon.role,
                    node: daemon.node.clone(),
                    state: daemon.state.clone(),
                    log: daemon.log.clone(),
                })
                .collect(),
            pods: self.pods.values().map(super::pods::Slot::report).collect(),
            services,
        };
        if report != self.report || !self.reported {
            match state::write_json(&self.options.state.report(), &report) {
                Ok(()) => self.reported = true,
                Err(error) => tracing::warn!(%error, "cannot write the report"),
            }
            self.report = report;
        }
    }

    /// The services with their addresses and endpoints; writes their status files.
    fn services(&mut self) -> Vec<ServiceView> {
        let (addresses, problems) = self.service_addresses.assign(self.loaded.services());
        let pods: Vec<_> = self
            .pods
            .values()
            .filter(|slot| !slot.terminating)
            .map(|slot| Candidate { pod: &slot.pod, addresses: &slot.given.addresses, ready: slot.ready() })
            .collect();
        let views: Vec<_> = self
            .loaded
            .services()
            .filter_map(|service| {
                let addresses = addresses.get(&cluster::key_of(service))?;
                Some(ServiceView::new(service, addresses, &pods))
            })
            .collect();
        self.service_problems = problems;
        self.write_services(&views);
        views
    }

    fn write_services(&mut self, views: &[ServiceView]) {
        let gone: Vec<Key> = self
            .service_files
            .keys()
            .filter(|key| !views.iter().any(|view| view.key == **key))
            .cloned()
            .collect();
        for key in gone {
            self.service_files.remove(&key);
            let path = self.options.state.service_status(&key.namespace, &key.name);
            if let Err(error) = state::remove_file(&path) {
                tracing::warn!(service = %key, %error, "cannot remove its status");
            }
        }
        for view in views {
            if self.service_files.get(&view.key) == Some(&view.addresses) {
                continue;
            }
            let path = self.options.state.service_status(&view.key.namespace, &view.key.name);
            match state::write_json(&path, &ServiceStatus { cluster_ips: view.addresses.clone() }) {
                Ok(()) => {
                    self.service_files.insert(view.key.clone(), view.addresses.clone());
                }
                Err(error) => tracing::warn!(service = %view.key, %error, "cannot write its status"),
            }
        }
    }

    fn apply_rules(&mut self, rules: &Rules) {
        for (name, node) in self.lab.nodes() {
            if self.rules.get(name) == Some(rules) {
                continue;
            }
            match rules.apply(node) {
                Ok(()) => {
                    self.rules.insert(name.to_owned(), rules.clone());
                    self.rule_problems.remove(name);
                }
                Err(error) => {
                    tracing::error!(node = name, %error, "cannot set the rules for services");
                    self.rule_problems.insert(name.to_owned(), format!("node {name}: {error}"));
                }
            }
        }
    }

    /// What is wrong, most important first.
    fn problems(&self) -> Vec<String> {
        let system = self.daemons.values().filter(|daemon| !daemon.state.ready).map(|daemon| {
            let problem = daemon.state.problem.as_deref().unwrap_or("starts");
            format!("{}: {problem}", daemon.label)
        });
        let files = self.loaded.errors.iter().map(ToString::to_string);
        let failures = self.failures.iter().map(|(key, failure)| format!("pod {key}: {failure}"));
        let pods = self.pods.values().filter_map(super::pods::Slot::problem);
        self.directory_problem
            .iter()
            .cloned()
            .chain(system)
            .chain(self.rule_problems.values().cloned())
            .chain(files)
            .chain(failures)
            .chain(self.service_problems.iter().cloned())
            .chain(pods)
            .collect()
    }

    fn settled(&self) -> bool {
        self.populated
            && self.failures.is_empty()
            && self.daemons.values().all(|daemon| daemon.state.ready)
            && self.pods.values().all(super::pods::Slot::settled)
    }
}
