//! A Gateway, to the objects that are made for it: pure, with golden files (D57 to D60, D62).

use culvert_k8s_api::gateway::Gateway;
use culvert_k8s_api::labels;
use serde_json::{Map, Value, json};

use super::merge::merge;
use super::overlay::{Overlays, PARTS, Part};
use crate::gateways::{self, HBONE_PORT};

/// Where readiness is asked, by the kubelet and by clients of the Service.
const STATUS_PORT: u16 = 15021;
/// Metrics.
const METRICS_PORT: u16 = 15020;
/// Nobody: the program opens no port below 1024 and writes no file.
const USER: u32 = 65532;

/// What every waypoint is told and given, besides what its Gateway says.
#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    /// Registry, path and tag.
    pub image: String,
    /// `Always`, `IfNotPresent` or `Never`.
    pub pull_policy: String,
    /// Names of Secrets of the Gateway's namespace.
    pub pull_secrets: Vec<String>,
    /// `resources` of the container.
    pub resources: Map<String, Value>,
    /// Laid over the pod's `spec` before any ConfigMap: where waypoints run.
    pub scheduling: Map<String, Value>,
    /// Environment: where the control plane is and what the mesh is called.
    pub env: Vec<(String, String)>,
    /// Seconds that open connections have when an instance is replaced (R17).
    pub grace: u32,
    /// What service names end with.
    pub cluster_domain: String,
}

/// One object to be there.
#[derive(Clone, Debug, PartialEq)]
pub struct Rendered {
    /// Which.
    pub part: Part,
    /// All of it that is ours.
    pub object: Map<String, Value>,
}

/// Why nothing can be rendered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Invalid {
    /// A reason of the Gateway's condition `Accepted`.
    pub reason: &'static str,
    /// For a person.
    pub message: String,
}

impl Invalid {
    /// What the Gateway itself says cannot be.
    pub fn gateway(message: String) -> Self {
        Self { reason: "Invalid", message }
    }

    /// What a ConfigMap says cannot be.
    pub fn parameters(message: String) -> Self {
        Self { reason: "InvalidParameters", message }
    }
}

/// Renders. `overlays` are laid over it in their order: those of the class first, those of the Gateway last.
///
/// # Errors
/// If the Gateway or an overlay asks for what cannot be.
pub fn render(
    gateway: &Gateway,
    port: u16,
    overlays: &[&Overlays],
    settings: &Settings,
) -> Result<Vec<Rendered>, Invalid> {
    let name = gateways::name_of(gateway).map_err(Invalid::gateway)?;
    let account = gateway.metadata.annotations.get(labels::GATEWAY_SERVICE_ACCOUNT);
    let made = Made { gateway, name, account: account.map_or(name, String::as_str), settings };
    let mut rendered = Vec::new();
    for part in PARTS {
        let wanted: Vec<_> = overlays.iter().filter_map(|it| it.get(&part)).collect();
        let object = match part {
            // One that exists already is somebody else's.
            Part::ServiceAccount if account.is_some_and(|it| it != name) => continue,
            Part::ServiceAccount => json!({ "automountServiceAccountToken": false }),
            Part::Service => made.service(port).map_err(Invalid::gateway)?,
            Part::Deployment => made.deployment().map_err(Invalid::gateway)?,
            Part::HorizontalPodAutoscaler | Part::PodDisruptionBudget if wanted.is_empty() => continue,
            Part::HorizontalPodAutoscaler => made.autoscaler(),
            Part::PodDisruptionBudget => {
                json!({ "spec": { "selector": { "matchLabels": made.selector() } } })
            }
        };
        let Value::Object(mut object) = object else { continue };
        object.insert("metadata".to_owned(), made.metadata());
        for overlay in wanted {
            merge(&mut object, overlay, part.key()).map_err(Invalid::parameters)?;
        }
        made.own(part, &mut object).map_err(Invalid::parameters)?;
        rendered.push(Rendered { part, object });
    }
    Ok(rendered)
}

struct Made<'a> {
    gateway: &'a Gateway,
    name: &'a str,
    account: &'a str,
    settings: &'a Settings,
}

impl Made<'_> {
    fn selector(&self) -> Value {
        json!({ labels::GATEWAY_NAME: self.gateway.metadata.name })
    }

    /// D59; the Gateway's own labels for what is made come before ours.
    fn labels(&self) -> Map<String, Value> {
        let infrastructure = self.gateway.spec.infrastructure.as_ref();
        let theirs = infrastructure.into_iter().flat_map(|it| &it.labels);
        let mut all: Map<String, Value> =
            theirs.map(|(key, value)| (key.clone(), value.as_str().into())).collect();
        all.extend(self.own_labels());
        all
    }

    fn own_labels(&self) -> Map<String, Value> {
        let own = [
            (labels::GATEWAY_NAME, self.gateway.metadata.name.as_str()),
            (labels::GATEWAY_CLASS_NAME, self.gateway.spec.gateway_class_name.as_str()),
            (labels::GATEWAY_MANAGED, gateways::MANAGED),
            (labels::DATAPLANE_MODE, labels::MODE_NONE),
        ];
        own.into_iter().map(|(key, value)| (key.to_owned(), value.into())).collect()
    }

    fn annotations(&self) -> Map<String, Value> {
        let infrastructure = self.gateway.spec.infrastructure.as_ref();
        let theirs = infrastructure.into_iter().flat_map(|it| &it.annotations);
        theirs.map(|(key, value)| (key.clone(), value.as_str().into())).collect()
    }

    fn metadata(&self) -> Value {
        let mut metadata = json!({ "labels": self.labels() });
        let annotations = self.annotations();
        if !annotations.is_empty() {
            metadata["annotations"] = annotations.into();
        }
        metadata
    }

    /// What no overlay may change: whose it is and what it is called.
    fn own(&self, part: Part, object: &mut Map<String, Value>) -> Result<(), String> {
        object.insert("apiVersion".to_owned(), part.api_version().into());
        object.insert("kind".to_owned(), part.kind().into());
        object.remove("status");
        let wrong = |field: &str| format!("{}.{field}: is no map", part.key());
        let metadata = object.entry("metadata").or_insert_with(|| json!({}));
        let metadata = metadata.as_object_mut().ok_or_else(|| wrong("metadata"))?;
        metadata.insert("name".to_owned(), self.name.into());
        metadata.insert("namespace".to_owned(), self.gateway.metadata.namespace.as_str().into());
        let owner = json!([{
            "apiVersion": "gateway.networking.k8s.io/v1", "kind": "Gateway", "controller": true,
            "name": self.gateway.metadata.name, "uid": self.gateway.metadata.uid,
        }]);
        metadata.insert("ownerReferences".to_owned(), owner);
        for field in ["uid", "resourceVersion", "managedFields", "generation", "generateName", "finalizers"] {
            metadata.remove(field);
        }
        let labels = metadata.entry("labels").or_insert_with(|| json!({}));
        let labels = labels.as_object_mut().ok_or_else(|| wrong("metadata.labels"))?;
        labels.extend(self.own_labels());
        Ok(())
    }

    fn service(&self, port: u16) -> Result<Value, String> {
        let kind = self.gateway.metadata.annotations.get(labels::SERVICE_TYPE);
        let kind = kind.map_or("ClusterIP", String::as_str);
        if !["ClusterIP", "NodePort", "LoadBalancer"].contains(&kind) {
            let what = labels::SERVICE_TYPE;
            return Err(format!("annotation {what} {kind:?} is none of ClusterIP, NodePort, LoadBalancer"));
        }
        Ok(json!({ "spec": {
            "type": kind,
            "ipFamilyPolicy": "PreferDualStack",
            "trafficDistribution": "PreferClose",
            "selector": self.selector(),
            "ports": [
                { "name": "status-port", "port": STATUS_PORT, "targetPort": STATUS_PORT, "protocol": "TCP", "appProtocol": "tcp" },
                { "name": "mesh", "port": port, "targetPort": HBONE_PORT, "protocol": "TCP", "appProtocol": "all" },
            ],
        } }))
    }

    fn deployment(&self) -> Result<Value, String> {
        let mut labels = self.labels();
        let names = [
            (labels::CANONICAL_NAME, self.name),
            (labels::CANONICAL_REVISION, "latest"),
            // It ends tunnels itself (D19).
            (labels::TUNNEL, labels::TUNNEL_HTTP),
        ];
        labels.extend(names.into_iter().map(|(key, value)| (key.to_owned(), value.into())));
        let mut annotations = self.annotations();
        for (key, value) in
            [("prometheus.io/scrape", "true"), ("prometheus.io/port", &METRICS_PORT.to_string())]
        {
            annotations.insert(key.to_owned(), value.into());
        }
        let Value::Object(mut pod) = self.pod() else { return Err("no pod".to_owned()) };
        merge(&mut pod, &self.settings.scheduling, "scheduling")?;
        // Without `replicas`: one, or as many as an autoscaler or a person says.
        Ok(json!({ "spec": {
            "selector": { "matchLabels": self.selector() },
            "strategy": { "type": "RollingUpdate", "rollingUpdate": { "maxSurge": 1, "maxUnavailable": 0 } },
            "template": { "metadata": { "labels": labels, "annotations": annotations }, "spec": pod },
        } }))
    }

    fn pod(&self) -> Value {
        let mut pod = json!({
            "serviceAccountName": self.account,
            "automountServiceAccountToken": false,
            "terminationGracePeriodSeconds": self.settings.grace,
            "securityContext": {
                "runAsNonRoot": true, "runAsUser": USER, "runAsGroup": USER, "fsGroup": USER,
                "seccompProfile": { "type": "RuntimeDefault" },
            },
            "containers": [self.container()],
            "volumes": [
                { "name": "token", "projected": { "sources": [
                    { "serviceAccountToken": { "audience": "istio-ca", "expirationSeconds": 43200, "path": "istio-token" } },
                ] } },
                { "name": "root", "configMap": { "name": "istio-ca-root-cert" } },
                { "name": "tmp", "emptyDir": { "medium": "Memory", "sizeLimit": "16Mi" } },
            ],
        });
        if !self.settings.pull_secrets.is_empty() {
            pod["imagePullSecrets"] =
                self.settings.pull_secrets.iter().map(|name| json!({ "name": name })).collect();
        }
        pod
    }

    fn container(&self) -> Value {
        let field = |name: &str, path: &str| json!({ "name": name, "valueFrom": { "fieldRef": { "fieldPath": path } } });
        let mut env = vec![
            field("NODE_NAME", "spec.nodeName"),
            field("POD_NAME", "metadata.name"),
            field("POD_NAMESPACE", "metadata.namespace"),
            field("INSTANCE_IP", "status.podIP"),
            field("SERVICE_ACCOUNT", "spec.serviceAccountName"),
            json!({ "name": "GATEWAY_NAME", "value": self.gateway.metadata.name }),
            json!({ "name": "GATEWAY_SERVICE", "value": self.name }),
            json!({ "name": "TERMINATION_GRACE_PERIOD_SECONDS", "value": self.settings.grace.to_string() }),
        ];
        for (name, value) in &self.settings.env {
            // What is said later wins: the API server takes no name twice.
            env.retain(|it| it["name"] != *name);
            env.push(json!({ "name": name, "value": value }));
        }
        json!({
            "name": "waypoint",
            "image": self.settings.image,
            "imagePullPolicy": self.settings.pull_policy,
            "args": ["proxy"],
            "env": env,
            "ports": [
                { "name": "mesh", "containerPort": HBONE_PORT, "protocol": "TCP" },
                { "name": "http-metrics", "containerPort": METRICS_PORT, "protocol": "TCP" },
                { "name": "status-port", "containerPort": STATUS_PORT, "protocol": "TCP" },
            ],
            "readinessProbe": {
                "httpGet": { "path": "/healthz/ready", "port": STATUS_PORT }, "periodSeconds": 2, "failureThreshold": 3,
            },
            "resources": self.settings.resources,
            "securityContext": {
                "allowPrivilegeEscalation": false, "privileged": false, "readOnlyRootFilesystem": true,
                "capabilities": { "drop": ["ALL"] },
            },
            "volumeMounts": [
                { "name": "token", "mountPath": "/var/run/secrets/tokens", "readOnly": true },
                { "name": "root", "mountPath": "/var/run/secrets/istio", "readOnly": true },
                { "name": "tmp", "mountPath": "/tmp" },
            ],
        })
    }

    fn autoscaler(&self) -> Value {
        json!({ "spec": {
            "scaleTargetRef": { "apiVersion": "apps/v1", "kind": "Deployment", "name": self.name },
            "maxReplicas": 1,
        } })
    }
}

#[cfg(test)]
#[path = "render_tests.rs"]
pub(crate) mod tests;
