//! A file that is good, bad, changed and gone.

use super::*;

const FILE: &str = r#"
workloads:
- uid: Kubernetes//Pod/shop/cart
  name: cart
  namespace: shop
  addresses: [10.0.0.1, "fd00::1"]
  tunnelProtocol: HBONE
  trustDomain: cluster.local
  serviceAccount: cart
  node: node-1
  workloadType: POD
  services:
    shop/cart.shop.svc.cluster.local:
      ports: [{servicePort: 80, targetPort: 8080}]
  authorizationPolicies: [shop/only-web]
services:
- name: cart
  namespace: shop
  hostname: cart.shop.svc.cluster.local
  addresses: [{address: 10.1.0.1}]
  ports: [{servicePort: 80, targetPort: 8080}]
  waypoint: {address: {address: 10.2.0.1}, hboneMtlsPort: 15008}
policies:
- name: only-web
  namespace: shop
  scope: WORKLOAD_SELECTOR
  action: ALLOW
  groups:
  - rules:
    - matches:
      - principals: [{exact: cluster.local/ns/shop/sa/web}]
        notSourceIps: [{address: 10.9.0.0, length: 16}]
"#;

fn write(dir: &tempfile::TempDir, text: &str) {
    let (path, next) = (dir.path().join("mesh.yaml"), dir.path().join("next"));
    std::fs::write(&next, text).unwrap();
    std::fs::rename(next, path).unwrap();
}

/// Z100: the API's messages, with addresses as text, become what a control plane would have sent.
#[test]
fn the_file_is_the_workload_api() {
    let (update, _) = parse(FILE).unwrap();
    let applied = culvert_model::snapshot::SnapshotWriter::new().apply(update);
    let snapshot = applied.snapshot;
    assert_eq!(snapshot.sizes(), (1, 1, 1));
    let cart = snapshot.workload_by_uid("Kubernetes//Pod/shop/cart").unwrap();
    let addresses: Vec<String> = cart.addresses.iter().map(ToString::to_string).collect();
    assert_eq!(addresses, ["10.0.0.1", "fd00::1"]);
    assert_eq!(cart.identity.to_string(), "spiffe://cluster.local/ns/shop/sa/cart");
    let service = snapshot.services().next().unwrap();
    assert_eq!(service.addresses[0].prefix.to_string(), "10.1.0.1/32");
    assert!(service.waypoint.is_some());
    assert!(format!("{:?}", snapshot.policies().next().unwrap()).contains("10.9.0.0/16"));
    assert_eq!(parse("").unwrap().0.addresses.len(), 0, "an empty mesh is one");
}

/// Z100: one mistake refuses the whole file, and is named.
#[test]
fn mistakes_are_refused_by_name() {
    for (from, to, says) in [
        (
            "tunnelProtocol: HBONE",
            "tunnelProtocl: HBONE",
            "workloads[0] \"Kubernetes//Pod/shop/cart\": unrecognized field name 'tunnelProtocl'",
        ),
        ("tunnelProtocol: HBONE", "tunnelProtocol: QUIC", "unrecognized enum value 'QUIC'"),
        ("addresses: [10.0.0.1,", "addresses: [10.0.0.300,", "workloads[0]"),
        (
            "  scope: WORKLOAD_SELECTOR",
            "  scopee: GLOBAL",
            "policies[0] \"shop/only-web\": unrecognized field",
        ),
        ("services:\n- name", "servces:\n- name", "unknown key \"servces\"; want workloads"),
        ("workloads:\n-", "workloads:\n ", "workloads: want a list"),
        ("- name: only-web", "- name: only-web\n  name: again", "line 25: duplicate mapping key: name"),
    ] {
        assert!(FILE.contains(from), "{from}");
        let error = format!("{:#}", parse(&FILE.replacen(from, to, 1)).map(drop).unwrap_err());
        assert!(error.contains(says), "{to}: {error}");
    }
    let twice = FILE.replacen(
        "services:\n- name",
        "- uid: Kubernetes//Pod/shop/cart\n  name: x\n  namespace: shop\nservices:\n- name",
        1,
    );
    assert!(format!("{:#}", parse(&twice).map(drop).unwrap_err()).contains("stands there twice"));
}

/// Z100: a bad file changes nothing, a good one says what is gone, and the same bytes are not news.
#[test]
fn the_last_good_content_stays() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("mesh.yaml");
    let mut file = LocalFile::new(&path);
    assert!(file.read().is_err());
    write(&dir, FILE);
    assert_eq!(file.read().unwrap().unwrap().generation, 1);
    assert!(file.read().unwrap().is_none());
    write(&dir, "workloads: 5\n");
    assert!(file.read().is_err());
    assert!(file.read().unwrap().is_none(), "said once");
    std::fs::remove_file(&path).unwrap();
    assert!(file.read().is_err());
    write(&dir, &FILE[..FILE.find("policies:").unwrap()]);
    let update = file.read().unwrap().unwrap();
    assert_eq!((update.generation, update.removed_addresses.len()), (2, 0));
    assert_eq!(update.removed_policies, ["shop/only-web".into()]);
}
