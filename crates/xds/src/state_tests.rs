//! The client's state machine by itself, against responses written by hand and against a model.

use super::*;
use bytes::Bytes;
use culvert_proto::Any;
use proptest::prelude::*;

const TYPE: &str = "type.test/a";

fn resource(name: &str, version: &str) -> Resource {
    let body = Any { type_url: TYPE.to_owned(), value: version.as_bytes().to_vec().into() };
    Resource {
        name: name.to_owned(),
        version: version.to_owned(),
        resource: Some(body),
        ..Resource::default()
    }
}

fn response(nonce: &str, added: &[(&str, &str)], removed: &[&str]) -> DeltaDiscoveryResponse {
    DeltaDiscoveryResponse {
        system_version_info: "v".to_owned(),
        resources: added.iter().map(|(name, version)| resource(name, version)).collect(),
        type_url: TYPE.to_owned(),
        nonce: nonce.to_owned(),
        removed_resources: removed.iter().map(ToString::to_string).collect(),
    }
}

fn client() -> DeltaClient {
    let subscription = Subscription { type_url: TYPE.to_owned(), names: Vec::new() };
    DeltaClient::new(Node { id: "n".to_owned(), ..Node::default() }, [subscription])
}

fn rejection(name: &str) -> Rejection {
    Rejection { name: name.to_owned(), reason: "bad".to_owned() }
}

fn known(client: &DeltaClient) -> Vec<(&str, &str)> {
    client.known(TYPE).unwrap().collect()
}

fn versions(client: &mut DeltaClient) -> Vec<(String, String)> {
    let mut versions: Vec<_> = client.connected().remove(0).initial_resource_versions.into_iter().collect();
    versions.sort();
    versions
}

fn pairs(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
    pairs.iter().map(|(a, b)| ((*a).to_owned(), (*b).to_owned())).collect()
}

#[test]
fn first_requests_are_wildcard_and_name_the_node_once() {
    let wanted = ["b", "a"].map(|type_url| Subscription { type_url: type_url.to_owned(), names: Vec::new() });
    let requests = DeltaClient::new(Node { id: "n".to_owned(), ..Node::default() }, wanted).connected();
    assert_eq!(requests.iter().map(|request| request.type_url.as_str()).collect::<Vec<_>>(), ["a", "b"]);
    assert_eq!(requests.iter().filter(|request| request.node.is_some()).count(), 1);
    assert!(requests[0].node.is_some());
    assert!(requests.iter().all(|request| request.resource_names_subscribe.is_empty()));
}

#[test]
fn a_version_is_known_once_accepted() {
    let mut client = client();
    client.connected();
    let delivery = client.received(response("1", &[("x", "1"), ("y", "1")], &[])).unwrap();
    assert_eq!((delivery.added.len(), &delivery.added[0].body[..]), (2, &b"1"[..]));
    assert_eq!(known(&client), []);
    let ack = client.answer(TYPE, "1", &[]).unwrap();
    assert_eq!((ack.response_nonce.as_str(), ack.error_detail), ("1", None));
    assert_eq!(known(&client), [("x", "1"), ("y", "1")]);

    client.received(response("2", &[("x", "2")], &["y"])).unwrap();
    client.answer(TYPE, "2", &[]).unwrap();
    assert_eq!(known(&client), [("x", "2")]);
    assert_eq!(versions(&mut client), pairs(&[("x", "2")]));
}

/// Z97.
#[test]
fn one_nack_lists_the_bad_ones_and_the_good_ones_count() {
    let mut client = client();
    client.connected();
    let mut first = response("1", &[("good", "1"), ("bad", "1"), ("twin", "1"), ("twin", "2")], &[]);
    first.resources.push(Resource { name: "bare".to_owned(), ..Resource::default() });
    first.resources.push(Resource { name: String::new(), ..resource("", "1") });
    let mut other = resource("other", "1");
    other.resource.as_mut().unwrap().type_url = "type.test/b".to_owned();
    first.resources.push(other);
    let delivery = client.received(first).unwrap();
    let names: Vec<_> = delivery.added.iter().map(|resource| &*resource.name).collect();
    assert_eq!(names, ["good", "bad"]);

    let nack = client.answer(TYPE, "1", &[rejection("bad")]).unwrap();
    let error = nack.error_detail.unwrap();
    assert_eq!(error.code, 3);
    for name in ["bad: bad", "bare: ", "twin: ", "other: "] {
        assert!(error.message.contains(name), "{}", error.message);
    }
    assert_eq!(known(&client), [("good", "1")]);
    // The others are asked for again, and would be reported if they are gone.
    let expected = [("bad", ""), ("bare", ""), ("good", "1"), ("other", ""), ("twin", "")];
    assert_eq!(versions(&mut client), pairs(&expected));
}

#[test]
fn what_was_not_answered_is_doubtful() {
    let mut client = client();
    client.connected();
    client.received(response("1", &[("changed", "1"), ("gone", "1"), ("kept", "1")], &[])).unwrap();
    client.answer(TYPE, "1", &[]).unwrap();
    client.received(response("2", &[("changed", "2"), ("new", "1")], &["gone"])).unwrap();
    assert_eq!(versions(&mut client), pairs(&[("changed", ""), ("gone", ""), ("kept", "1"), ("new", "")]));
    assert_eq!(client.answer(TYPE, "2", &[]), Err(ProtocolError::UnknownNonce("2".to_owned())));
    client.received(response("1", &[("changed", "2")], &["gone", "new"])).unwrap();
    client.answer(TYPE, "1", &[]).unwrap();
    assert_eq!(versions(&mut client), pairs(&[("changed", "2"), ("kept", "1")]));
}

#[test]
fn a_refused_response_changes_nothing() {
    let mut client = client();
    client.connected();
    client.received(response("1", &[("x", "1")], &[])).unwrap();
    client.answer(TYPE, "1", &[]).unwrap();
    client.received(response("2", &[("y", "1")], &["x"])).unwrap();
    let nack = client.nacked(TYPE, "2", &"long ".repeat(MAX_NACK_BYTES)).unwrap();
    assert!(nack.error_detail.unwrap().message.len() <= MAX_NACK_BYTES);
    assert_eq!(known(&client), [("x", "1")]);
    assert_eq!(versions(&mut client), pairs(&[("x", ""), ("y", "")]));
}

#[test]
fn breaches_of_the_protocol_are_errors() {
    let mut client = client();
    client.connected();
    let unknown = DeltaDiscoveryResponse { type_url: "other".to_owned(), ..response("1", &[], &[]) };
    assert_eq!(client.received(unknown), Err(ProtocolError::UnknownType("other".to_owned())));
    assert_eq!(client.received(response("", &[], &[])), Err(ProtocolError::NoNonce(TYPE.to_owned())));
    client.received(response("1", &[], &[])).unwrap();
    assert_eq!(client.received(response("1", &[], &[])), Err(ProtocolError::DuplicateNonce("1".to_owned())));
    client.received(response("2", &[], &[])).unwrap();
    assert_eq!(client.answer(TYPE, "2", &[]), Err(ProtocolError::OutOfOrder("2".to_owned())));
    assert_eq!(client.answer(TYPE, "3", &[]), Err(ProtocolError::UnknownNonce("3".to_owned())));
    assert_eq!(client.answer("other", "1", &[]), Err(ProtocolError::UnknownNonce("1".to_owned())));
    client.answer(TYPE, "1", &[]).unwrap();
    assert_eq!(client.received(response("1", &[], &[])), Err(ProtocolError::DuplicateNonce("1".to_owned())));
    for nonce in 3..=MAX_OUTSTANDING + 1 {
        client.received(response(&nonce.to_string(), &[], &[])).unwrap();
    }
    assert_eq!(
        client.received(response("x", &[], &[])),
        Err(ProtocolError::TooManyOutstanding(TYPE.to_owned()))
    );
}

/// TRAP22, R01.
#[test]
fn versions_that_do_not_fit_are_left_out_and_swept() {
    let mut client = client();
    client.connected();
    let names: Vec<_> = (0..40_000)
        .map(|index| format!("Kubernetes//Pod/some-namespace/some-deployment-{index:08}-abcde"))
        .collect();
    let all: Vec<_> = names.iter().map(|name| (name.as_str(), "0123456789abcdef")).collect();
    client.received(response("1", &all, &[])).unwrap();
    client.answer(TYPE, "1", &[]).unwrap();

    let request = client.connected().remove(0);
    let sent = request.initial_resource_versions;
    let size = prost::Message::encoded_len(&DeltaDiscoveryRequest {
        initial_resource_versions: sent.clone(),
        ..Default::default()
    });
    assert!(size <= MAX_VERSIONS_BYTES && size > MAX_VERSIONS_BYTES * 9 / 10, "{size}");
    let left_out: Vec<_> = names.iter().filter(|name| !sent.contains_key(*name)).collect();
    assert!(left_out.len() > 1_000, "{}", left_out.len());

    // The server, which was not told of them, pushes those that exist, in two parts; the first of them is gone.
    let (half, rest) = left_out[1..].split_at(left_out.len() / 2);
    for (nonce, generation, part) in [("1", "culvert/7+", half), ("2", "culvert/7", rest)] {
        let added: Vec<_> = part.iter().map(|name| (name.as_str(), "0123456789abcdef")).collect();
        let part = DeltaDiscoveryResponse {
            system_version_info: generation.to_owned(),
            ..response(nonce, &added, &[])
        };
        let delivery = client.received(part).unwrap();
        let gone: &[String] = if nonce == "2" { std::slice::from_ref(left_out[0]) } else { &[] };
        assert_eq!(delivery.removed, gone);
        client.answer(TYPE, nonce, &[]).unwrap();
    }
    assert_eq!(client.known(TYPE).unwrap().count(), names.len() - 1);
}

/// R02, U35: 100,000 names go to a server of ours, which takes 16 MiB; to others no more than any takes (R01).
#[test]
fn how_many_versions_a_request_brings_depends_on_the_server() {
    let mut client = client();
    client.connected();
    let names: Vec<_> = (0..100_000)
        .map(|index| format!("Kubernetes//Pod/some-namespace/some-deployment-{index:08}-abcde"))
        .collect();
    let all: Vec<_> = names.iter().map(|name| (name.as_str(), "0123456789abcdef")).collect();
    let push = |nonce, generation: &str, all| DeltaDiscoveryResponse {
        system_version_info: generation.to_owned(),
        ..response(nonce, all, &[])
    };
    client.received(push("1", "culvert/7", &all)).unwrap();
    client.answer(TYPE, "1", &[]).unwrap();
    let brought = |client: &mut DeltaClient| client.connected().remove(0).initial_resource_versions.len();
    assert_eq!(brought(&mut client), names.len());
    client.too_long();
    assert!(brought(&mut client) < 40_000, "that server took less");
    client.received(push("1", "culvert/8", &all)).unwrap();
    client.answer(TYPE, "1", &[]).unwrap();
    assert_eq!(brought(&mut client), names.len(), "ours is back");
    client.received(push("1", "2026-11-23/1", &[])).unwrap();
    assert!(brought(&mut client) < 40_000, "another control plane took over");
}

#[derive(Debug, Clone)]
enum Step {
    Push { added: Vec<(u8, u8)>, removed: Vec<u8> },
    Answer { rejected: Vec<u8> },
    Refuse,
    Reconnect,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let names = || prop::collection::vec(0u8..6, 0..4);
    let push = (prop::collection::vec((0u8..6, 0u8..4), 0..4), names());
    let step = prop_oneof![
        4 => push.prop_map(|(added, removed)| Step::Push { added, removed }),
        4 => names().prop_map(|rejected| Step::Answer { rejected }),
        1 => Just(Step::Refuse),
        1 => Just(Step::Reconnect),
    ];
    prop::collection::vec(step, 0..60)
}

proptest! {
    /// After any sequence the known set is what was accepted, and every name that the client was ever offered, and was not
    /// told to remove, is named at the next connection.
    #[test]
    fn known_is_what_was_accepted(steps in steps()) {
        let mut client = client();
        client.connected();
        let mut accepted = BTreeMap::<String, String>::new();
        let mut mayhold = BTreeSet::<String>::new();
        let mut waiting = VecDeque::<Delivery>::new();
        let mut nonce = 0;
        for step in steps {
            match step {
                Step::Push { added, removed } => {
                    nonce += 1;
                    let added: Vec<_> = added.iter().map(|(name, version)| (name.to_string(), version.to_string())).collect();
                    let removed: Vec<_> = removed.iter().map(ToString::to_string).collect();
                    let resources: Vec<_> = added.iter().map(|(name, version)| (name.as_str(), version.as_str())).collect();
                    let removed: Vec<_> = removed.iter().map(String::as_str).collect();
                    match client.received(response(&nonce.to_string(), &resources, &removed)) {
                        Ok(delivery) => {
                            mayhold.extend(delivery.added.iter().map(|resource| resource.name.to_string()));
                            waiting.push_back(delivery);
                        }
                        Err(error) => prop_assert_eq!(error, ProtocolError::TooManyOutstanding(TYPE.to_owned())),
                    }
                }
                Step::Answer { rejected } => {
                    let Some(delivery) = waiting.pop_front() else { continue };
                    let rejected: Vec<_> = rejected.iter().map(|name| rejection(&name.to_string())).collect();
                    client.answer(TYPE, &delivery.nonce, &rejected).unwrap();
                    for name in delivery.removed {
                        accepted.remove(&name);
                        mayhold.remove(&name);
                    }
                    for resource in delivery.added {
                        if rejected.iter().all(|bad| *bad.name != *resource.name) {
                            accepted.insert(resource.name.to_string(), resource.version);
                        }
                    }
                }
                Step::Refuse => {
                    let Some(delivery) = waiting.pop_front() else { continue };
                    client.nacked(TYPE, &delivery.nonce, "no").unwrap();
                }
                Step::Reconnect => {
                    waiting.clear();
                    let sent = client.connected().remove(0).initial_resource_versions;
                    prop_assert!(mayhold.iter().all(|name| sent.contains_key(name)), "{:?} in {:?}", mayhold, sent);
                    for (name, version) in &sent {
                        prop_assert!(version.is_empty() || accepted.get(name) == Some(version));
                    }
                }
            }
            let accepted = accepted.iter().map(|(name, version)| (name.as_str(), version.as_str()));
            prop_assert!(client.known(TYPE).unwrap().eq(accepted));
        }
    }

    #[test]
    fn any_response_is_answered_or_refused(
        type_url in "(type.test/a|x)?", nonce in "[12]?", generation in "(culvert/)?[0-9]{0,3}\\+?",
        resources in prop::collection::vec(("[ab]?", "[12]?", prop::option::of("(type.test/a|x)?")), 0..5),
    ) {
        let mut client = client();
        client.connected();
        let body = |type_url| Any { type_url, value: Bytes::new() };
        let resources = resources.into_iter().map(|(name, version, type_url)| {
            Resource { name, version, resource: type_url.map(body), ..Resource::default() }
        });
        let response = DeltaDiscoveryResponse {
            system_version_info: generation, resources: resources.collect(), type_url, nonce, removed_resources: vec!["a".to_owned()],
        };
        if let Ok(delivery) = client.received(response) {
            prop_assert!(client.answer(&delivery.type_url, &delivery.nonce, &[]).is_ok());
        }
    }
}
