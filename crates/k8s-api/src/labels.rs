//! Every label and annotation the mesh reads or writes, in one place.

/// On a namespace or a pod: [`MODE_AMBIENT`] or [`MODE_NONE`] (C01, C07).
pub const DATAPLANE_MODE: &str = "istio.io/dataplane-mode";
/// Joins.
pub const MODE_AMBIENT: &str = "ambient";
/// Stays outside, on a pod even when its namespace joins.
pub const MODE_NONE: &str = "none";

/// Name of the waypoint that a namespace, service or pod is bound to; `none` unbinds.
pub const USE_WAYPOINT: &str = "istio.io/use-waypoint";
/// Namespace of that waypoint; the object's own if absent.
pub const USE_WAYPOINT_NAMESPACE: &str = "istio.io/use-waypoint-namespace";
/// The value of [`USE_WAYPOINT`] that unbinds.
pub const WAYPOINT_NONE: &str = "none";
/// Name of a second waypoint of a namespace or service, which a share of its connections goes through (W09).
pub const USE_WAYPOINT_CANARY: &str = "istio.io/use-waypoint-canary";
/// Namespace of that waypoint; the object's own if absent.
pub const USE_WAYPOINT_CANARY_NAMESPACE: &str = "istio.io/use-waypoint-canary-namespace";
/// Annotation beside [`USE_WAYPOINT_CANARY`]: the share, 0 to 100.
pub const USE_WAYPOINT_CANARY_WEIGHT: &str = "istio.io/use-waypoint-canary-weight";
/// On a Gateway or its class: what is sent through the waypoint (W04): `service`, `workload`, `all` or `none`.
pub const WAYPOINT_FOR: &str = "istio.io/waypoint-for";

/// On everything that is made for a Gateway: its name (D59).
pub const GATEWAY_NAME: &str = "gateway.networking.k8s.io/gateway-name";
/// On everything that is made for a Gateway: its class (D59).
pub const GATEWAY_CLASS_NAME: &str = "gateway.networking.k8s.io/gateway-class-name";
/// On everything that is made for a Gateway: who made it and may change it (D61).
pub const GATEWAY_MANAGED: &str = "gateway.istio.io/managed";
/// On a ConfigMap of the installation's namespace: the class whose Gateways it has overlays for (D60).
pub const DEFAULTS_FOR_CLASS: &str = "gateway.istio.io/defaults-for-class";
/// Annotation of a Gateway: the name of what is made for it, instead of its own (D62).
pub const NAME_OVERRIDE: &str = "gateway.istio.io/name-override";
/// Annotation of a Gateway: a service account that exists, instead of one that is made for it (D62).
pub const GATEWAY_SERVICE_ACCOUNT: &str = "gateway.istio.io/service-account";
/// Annotation of a Gateway: the type of its Service (D62).
pub const SERVICE_TYPE: &str = "networking.istio.io/service-type";

/// Annotation that the agent writes: `enabled` or `pending` (C09, C10).
pub const REDIRECTION: &str = "ambient.istio.io/redirection";
/// Annotation of a pod: DNS capture for this pod, over the global setting (C11).
pub const DNS_CAPTURE: &str = "ambient.istio.io/dns-capture";
/// Annotation of a pod: no capture of inbound plaintext (C12).
pub const BYPASS_INBOUND_CAPTURE: &str = "ambient.istio.io/bypass-inbound-capture";
/// Annotation of a pod: interfaces whose TCP is redirected (C13).
pub const REROUTE_VIRTUAL_INTERFACES: &str = "istio.io/reroute-virtual-interfaces";
/// Annotation of a pod, ours (C14): ports, joined by commas, that the pod reaches without the mesh.
pub const EXCLUDE_OUTBOUND_PORTS: &str = "culvert.dev/exclude-outbound-ports";
/// Annotation of a pod, ours (C14): networks in CIDR notation, joined by commas, that the pod reaches without the mesh.
pub const EXCLUDE_OUTBOUND_CIDRS: &str = "culvert.dev/exclude-outbound-cidrs";
/// Annotation of a pod, ours (C14): ports of the pod, joined by commas, at which plaintext goes straight to the application: no
/// policy judges it, not even STRICT.
pub const EXCLUDE_INBOUND_PORTS: &str = "culvert.dev/exclude-inbound-ports";
/// Annotation that a sidecar injector writes; such a pod never joins (C04).
pub const SIDECAR_STATUS: &str = "sidecar.istio.io/status";

/// Label of the mesh's own pods; `ztunnel` never joins (C05).
pub const APP: &str = "app";
/// The app of the node tunnel.
pub const APP_ZTUNNEL: &str = "ztunnel";
/// Version label, last in the order of D28.
pub const VERSION: &str = "version";
/// Canonical service name (D28).
pub const CANONICAL_NAME: &str = "service.istio.io/canonical-name";
/// Canonical revision (D28).
pub const CANONICAL_REVISION: &str = "service.istio.io/canonical-revision";
/// Recommended app name (D28).
pub const K8S_APP_NAME: &str = "app.kubernetes.io/name";
/// Recommended app version (D28).
pub const K8S_APP_VERSION: &str = "app.kubernetes.io/version";
/// Name given to a workload over that of its controller.
pub const WORKLOAD_NAME: &str = "service.istio.io/workload-name";

/// Label on a workload that speaks HBONE itself (D19); value `http`.
pub const TUNNEL: &str = "networking.istio.io/tunnel";
/// The value of [`TUNNEL`].
pub const TUNNEL_HTTP: &str = "http";

/// Region of a node (D23).
pub const TOPOLOGY_REGION: &str = "topology.kubernetes.io/region";
/// Zone of a node (D23).
pub const TOPOLOGY_ZONE: &str = "topology.kubernetes.io/zone";
/// Subzone of a node (D23).
pub const TOPOLOGY_SUBZONE: &str = "topology.istio.io/subzone";

/// Annotation on a service or namespace: how load is spread (D24).
pub const TRAFFIC_DISTRIBUTION: &str = "networking.istio.io/traffic-distribution";
/// Annotation on an AuthorizationPolicy: log what it would do (D37).
pub const DRY_RUN: &str = "istio.io/dry-run";
/// Set by Kubernetes on each namespace; selects it by name.
pub const NAMESPACE_NAME: &str = "kubernetes.io/metadata.name";

/// Taints of a node whose agent was not ready yet (C84): ambient's, and ours.
pub const NOT_READY: [&str; 2] = ["cni.istio.io/not-ready", "culvert.dev/not-ready"];

/// On an EndpointSlice: the Service it is of.
pub const SERVICE_NAME: &str = "kubernetes.io/service-name";
/// On an EndpointSlice: who writes it.
pub const SLICE_MANAGED_BY: &str = "endpointslice.kubernetes.io/managed-by";
/// The value of [`SLICE_MANAGED_BY`] on slices that Kubernetes makes of the pods that a Service selects.
pub const SLICE_OF_SELECTOR: &str = "endpointslice-controller.k8s.io";
