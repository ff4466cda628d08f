//! Istio's standard labels (Z105, W70).

use std::sync::Arc;

use culvert_model::Str;
use culvert_model::identity::Identity;
use culvert_model::service::Service;
use culvert_model::workload::Workload;
use prometheus_client::encoding::{EncodeLabelSet, EncodeLabelValue, LabelValueEncoder};

/// Who and where.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Labels {
    reporter: &'static str,
    source_workload: Label,
    source_canonical_service: Label,
    source_canonical_revision: Label,
    source_workload_namespace: Label,
    source_principal: Label,
    source_app: Label,
    source_version: Label,
    source_cluster: Label,
    destination_service: Label,
    destination_service_name: Label,
    destination_service_namespace: Label,
    destination_workload: Label,
    destination_canonical_service: Label,
    destination_canonical_revision: Label,
    destination_workload_namespace: Label,
    destination_principal: Label,
    destination_app: Label,
    destination_version: Label,
    destination_cluster: Label,
    request_protocol: &'static str,
    response_flags: &'static str,
    connection_security_policy: &'static str,
}

/// [`Labels`] and how a request was answered.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct RequestLabels {
    #[prometheus(flatten)]
    labels: Labels,
    response_code: u16,
    grpc_response_status: Label,
}

/// What labels are made of.
#[derive(Clone, Copy, Debug)]
pub struct Parties<'a> {
    /// Who asked.
    pub identity: &'a Identity,
    /// Its workload.
    pub source: Option<&'a Arc<Workload>>,
    /// What was asked for.
    pub service: Option<&'a Arc<Service>>,
    /// Who answered.
    pub destination: Option<&'a Arc<Workload>>,
}

/// A label's value; `unknown` where there is none.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Label(Option<Str>);

impl Labels {
    /// The labels of something between these.
    pub fn new(protocol: &'static str, flags: &'static str, parties: &Parties<'_>) -> Self {
        let mut labels = Self::anonymous(protocol, flags);
        labels.source_principal = Label(Some(parties.identity.to_string().into()));
        if let Some(service) = parties.service {
            labels.destination_service = Label::of(&service.key.hostname);
            labels.destination_service_name = Label::of(&service.name);
            labels.destination_service_namespace = Label::of(&service.key.namespace);
        }
        if let Some(w) = parties.source {
            labels.source_workload = Label::of(&w.workload_name);
            labels.source_canonical_service = Label::of(&w.canonical_name);
            labels.source_canonical_revision = Label::of(&w.canonical_revision);
            labels.source_workload_namespace = Label::of(&w.namespace);
            labels.source_app = Label::of(&w.canonical_name);
            labels.source_version = Label::of(&w.canonical_revision);
            labels.source_cluster = Label::of(&w.cluster_id);
        }
        if let Some(w) = parties.destination {
            labels.destination_principal = Label(Some(w.identity.to_string().into()));
            labels.destination_workload = Label::of(&w.workload_name);
            labels.destination_canonical_service = Label::of(&w.canonical_name);
            labels.destination_canonical_revision = Label::of(&w.canonical_revision);
            labels.destination_workload_namespace = Label::of(&w.namespace);
            labels.destination_app = Label::of(&w.canonical_name);
            labels.destination_version = Label::of(&w.canonical_revision);
            labels.destination_cluster = Label::of(&w.cluster_id);
        }
        labels
    }

    /// The same without parties: what is left where there is no room for another series.
    pub fn without_parties(&self) -> Self {
        Self::anonymous(self.request_protocol, self.response_flags)
    }

    fn anonymous(protocol: &'static str, flags: &'static str) -> Self {
        let none = || Label(None);
        Self {
            reporter: "waypoint",
            source_workload: none(),
            source_canonical_service: none(),
            source_canonical_revision: none(),
            source_workload_namespace: none(),
            source_principal: none(),
            source_app: none(),
            source_version: none(),
            source_cluster: none(),
            destination_service: none(),
            destination_service_name: none(),
            destination_service_namespace: none(),
            destination_workload: none(),
            destination_canonical_service: none(),
            destination_canonical_revision: none(),
            destination_workload_namespace: none(),
            destination_principal: none(),
            destination_app: none(),
            destination_version: none(),
            destination_cluster: none(),
            request_protocol: protocol,
            response_flags: flags,
            connection_security_policy: "mutual_tls",
        }
    }
}

impl RequestLabels {
    /// With the status of the response, 0 if there was none, and gRPC's own.
    pub fn new(labels: Labels, response_code: u16, grpc: Option<u16>) -> Self {
        let grpc_response_status = Label(grpc.map(|code| code.to_string().into()));
        Self { labels, response_code, grpc_response_status }
    }

    /// The same without parties.
    pub fn without_parties(&self) -> Self {
        Self { labels: self.labels.without_parties(), ..self.clone() }
    }
}

impl Label {
    fn of(text: &Str) -> Self {
        Self((!text.is_empty()).then(|| text.clone()))
    }
}

impl EncodeLabelValue for Label {
    fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> Result<(), std::fmt::Error> {
        self.0.as_deref().unwrap_or("unknown").encode(encoder)
    }
}
