//! The examples are read by the same code that the programs use.

use culvert_k8s_api::manifest::{Loaded, load_dir};

fn example(name: &str) -> Loaded {
    let dir = culvert_xtask::root().join("examples").join(name);
    let loaded = load_dir(&dir).unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(loaded.errors, [], "examples/{name}");
    assert_eq!(loaded.notes, [], "examples/{name}: something in it is of no effect");
    loaded
}

#[test]
fn hello_has_two_versions_behind_one_service_and_a_pod_outside_the_mesh() {
    let hello = example("hello");
    assert_eq!(hello.services().count(), 1);
    assert_eq!(hello.authorization_policies().count(), 1);
    assert_eq!(hello.peer_authentications().count(), 1);
    let pods: Vec<_> = hello.pods().map(|pod| pod.metadata.name.as_str()).collect();
    for name in ["client", "stranger", "outsider", "server-v1", "server-v2"] {
        assert!(pods.contains(&name), "{name} is not in {pods:?}");
    }
}

#[test]
fn shop_is_an_application_of_five_services() {
    let shop = example("shop");
    assert!(shop.services().count() >= 5);
    assert!(shop.authorization_policies().count() + shop.peer_authentications().count() >= 1);
}
