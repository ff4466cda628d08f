//! A large mesh that is made up: services of ten pods each, and what a mesh of that size goes through all day.

use culvert_proto::security as policy;
use culvert_proto::workload as proto;
use culvert_proto::{ADDRESS_TYPE_URL, AUTHORIZATION_TYPE_URL};
use culvert_xds::resources::{Resource, ResourceMap, ResourceSet};
use prost::Message;

/// Namespaces that services are spread over.
const NAMESPACES: usize = 200;
/// Policies with a selector, one in each namespace, and one for the whole mesh.
const POLICIES: usize = NAMESPACES;
/// First address of the pods: 10.0.0.0/8 has room for 16 million, and nothing here routes there.
const PODS: u32 = u32::from_be_bytes([10, 0, 0, 0]);
/// First address of the services.
const SERVICES: u32 = u32::from_be_bytes([172, 16, 0, 0]);
/// Nodes and zones that pods are spread over.
const NODES: usize = 1_000;
const ZONES: usize = 3;

/// The mesh and its next changes.
pub struct Mesh {
    services: usize,
    workloads: Vec<Pod>,
    set: ResourceSet,
    /// The pod that changes next.
    next: usize,
    edits: usize,
    next_address: u32,
}

#[derive(Clone, Copy)]
struct Pod {
    /// How often it was replaced: each incarnation has another name and address.
    incarnation: u32,
    address: u32,
    ready: bool,
    revision: u32,
}

impl Mesh {
    /// Makes `workloads` pods of `services` services, beside `real` resources that stay as they are.
    pub fn new(workloads: usize, services: usize, real: Vec<(String, proto::Workload)>) -> Self {
        let pod = |n: usize| Pod { incarnation: 0, address: PODS + n as u32, ready: true, revision: 0 };
        let mut mesh = Self {
            services,
            workloads: (0..workloads).map(pod).collect(),
            set: ResourceSet { generation: 1, ..ResourceSet::default() },
            next: 0,
            edits: 0,
            next_address: PODS + workloads as u32,
        };
        for (name, workload) in real {
            let message = proto::address::Type::Workload(workload);
            mesh.addresses().insert(name.as_str().into(), address(message));
        }
        for n in 0..services {
            mesh.put_service(n, 0);
        }
        for n in 0..workloads {
            mesh.put(n);
        }
        for n in 0..POLICIES {
            mesh.put_policy(n, 0);
        }
        mesh
    }

    /// What is to be served now.
    pub fn set(&self) -> ResourceSet {
        self.set.clone()
    }

    /// Changes `count` pods, the next in turn, and now and then a service and a policy: half of the pods become ready or not,
    /// a quarter is labelled anew, a quarter is replaced by a pod of another name and address.
    pub fn change(&mut self, count: usize) {
        for _ in 0..count {
            let n = self.next;
            self.next = (self.next + 1) % self.workloads.len();
            match n % 4 {
                0 | 1 => self.workloads[n].ready = !self.workloads[n].ready,
                2 => self.workloads[n].revision += 1,
                _ => {
                    let gone = self.uid(n);
                    self.addresses().remove(gone.as_str());
                    self.workloads[n].incarnation += 1;
                    self.workloads[n].address = self.next_address;
                    self.next_address += 1;
                }
            }
            self.put(n);
        }
        self.edits += 1;
        self.put_service(self.edits % self.services, self.edits);
        self.put_policy(self.edits % POLICIES, self.edits);
        self.set.generation += 1;
    }

    fn addresses(&mut self) -> &mut ResourceMap {
        map(&mut self.set, ADDRESS_TYPE_URL)
    }

    fn name(&self, n: usize) -> String {
        let (service, incarnation) = (n % self.services, self.workloads[n].incarnation);
        format!(
            "service-{service}-{:x}-{n:05}{incarnation}",
            0x7d9f_8b6c_u32.wrapping_mul(service as u32 + 1)
        )
    }

    fn uid(&self, n: usize) -> String {
        format!("Kubernetes//Pod/{}/{}", namespace(n % self.services), self.name(n))
    }

    fn put(&mut self, n: usize) {
        let (pod, service, uid) = (self.workloads[n], n % self.services, self.uid(n));
        let namespace = namespace(service);
        let port = proto::Port { service_port: 80, target_port: 8080, app_protocol: 1 };
        let hostname = hostname(service);
        let ready = proto::WorkloadStatus::Healthy;
        let workload = proto::Workload {
            uid: uid.clone(),
            name: self.name(n),
            namespace: namespace.clone(),
            addresses: vec![pod.address.to_be_bytes().to_vec()],
            tunnel_protocol: proto::TunnelProtocol::Hbone.into(),
            trust_domain: "cluster.local".to_owned(),
            service_account: format!("service-{service}"),
            node: format!("ip-10-1-{}-{}.eu-central-1.compute.internal", n % NODES / 250, n % 250),
            canonical_name: format!("service-{service}"),
            canonical_revision: format!("v{}", pod.revision),
            workload_type: proto::WorkloadType::Deployment.into(),
            workload_name: format!("service-{service}"),
            services: [(format!("{namespace}/{hostname}"), proto::PortList { ports: vec![port] })].into(),
            authorization_policies: vec![format!("{namespace}/{}", policy_name(service % NAMESPACES))],
            status: if pod.ready { ready } else { proto::WorkloadStatus::Unhealthy }.into(),
            cluster_id: "Kubernetes".to_owned(),
            locality: Some(proto::Locality {
                region: "eu-central-1".to_owned(),
                zone: format!("eu-central-1{}", char::from(b'a' + (n % NODES % ZONES) as u8)),
                subzone: String::new(),
            }),
            ..proto::Workload::default()
        };
        self.addresses().insert(uid.into(), address(proto::address::Type::Workload(workload)));
    }

    fn put_service(&mut self, n: usize, edit: usize) {
        let namespace = namespace(n);
        let service = proto::Service {
            name: format!("service-{n}"),
            namespace: namespace.clone(),
            hostname: hostname(n),
            addresses: vec![proto::NetworkAddress {
                address: (SERVICES + n as u32).to_be_bytes().to_vec(),
                ..proto::NetworkAddress::default()
            }],
            ports: vec![proto::Port {
                service_port: 80,
                target_port: 8080 + (edit % 1000) as u32,
                app_protocol: 1,
            }],
            canonical: true,
            ..proto::Service::default()
        };
        let name = format!("{namespace}/{}", service.hostname);
        self.addresses().insert(name.into(), address(proto::address::Type::Service(service)));
    }

    fn put_policy(&mut self, n: usize, edit: usize) {
        let matches = policy::Match {
            not_destination_ports: vec![8080 + edit as u32 % 1000],
            ..policy::Match::default()
        };
        let message = policy::Authorization {
            name: policy_name(n),
            namespace: namespace(n),
            scope: policy::Scope::WorkloadSelector.into(),
            action: policy::Action::Deny.into(),
            groups: vec![policy::Group { rules: vec![policy::Rules { matches: vec![matches] }] }],
            ..policy::Authorization::default()
        };
        let name = format!("{}/{}", message.namespace, message.name);
        let resource = Resource::hashed(message.encode_to_vec());
        map(&mut self.set, AUTHORIZATION_TYPE_URL).insert(name.into(), resource);
    }
}

fn map<'a>(set: &'a mut ResourceSet, type_url: &str) -> &'a mut ResourceMap {
    std::sync::Arc::make_mut(set.types.entry(type_url.to_owned()).or_default())
}

fn address(message: proto::address::Type) -> Resource {
    Resource::hashed(proto::Address { r#type: Some(message) }.encode_to_vec())
}

fn namespace(service: usize) -> String {
    format!("team-{}", service % NAMESPACES)
}

fn hostname(service: usize) -> String {
    format!("service-{service}.{}.svc.cluster.local", namespace(service))
}

fn policy_name(n: usize) -> String {
    format!("ports-of-team-{n}")
}
