//! From a pod and its annotations to what the agent does for it. Pure.

use std::path::PathBuf;

use culvert_k8s_api::core::Pod;
use culvert_k8s_api::values::Port;
use culvert_k8s_api::{enrolment, labels};
use culvert_net::redirect::RedirectConfig;

use crate::agent::{Desired, exclusions};

/// What a pod that joins should have. `dns_capture` holds where the pod does not say (C11).
pub fn describe(pod: &Pod, uid: &str, netns: PathBuf, dns_capture: bool) -> Desired {
    let annotations = &pod.metadata.annotations;
    let flag = |name: &str| annotations.get(name).map(|value| value == "true");
    let native_tunnel = enrolment::speaks_hbone(&pod.metadata.labels);
    let dns = flag(labels::DNS_CAPTURE).unwrap_or(dns_capture);
    let mut rules = RedirectConfig {
        dns_port: dns.then_some(crate::config::DNS_PORT),
        bypass_inbound: native_tunnel || flag(labels::BYPASS_INBOUND_CAPTURE).unwrap_or(false),
        probe_ports: pod.probe_ports().into_iter().map(Port::get).collect(),
        ..RedirectConfig::default()
    };
    let problem = exclusions::apply(annotations, &mut rules);
    Desired {
        uid: uid.to_owned(),
        name: pod.metadata.name.clone(),
        namespace: pod.metadata.namespace.clone(),
        service_account: pod.service_account().to_owned(),
        native_tunnel,
        netns,
        rules,
        problem,
    }
}
