use culvert_identity::certificate::WorkloadCertificate;
use culvert_identity::csr::CertificateRequest;
use culvert_model::identity::Identity;
use culvert_runtime::clock::{Clock, SystemClock};
use parking_lot::Mutex;

use super::*;

#[derive(Clone, Default)]
struct Fake(Arc<Mutex<BTreeMap<String, Data>>>);

#[tonic::async_trait]
impl Secrets for Fake {
    async fn get(&self, name: &str) -> Result<Option<Data>, String> {
        tokio::task::yield_now().await;
        Ok(self.0.lock().get(name).cloned())
    }

    async fn create(&self, name: &str, data: &Data) -> Result<bool, String> {
        let mut all = self.0.lock();
        if all.contains_key(name) {
            return Ok(false);
        }
        all.insert(name.to_owned(), data.clone());
        Ok(true)
    }

    async fn set(&self, name: &str, data: &Data) -> Result<(), String> {
        self.0.lock().entry(name.to_owned()).or_default().extend(data.clone());
        Ok(())
    }
}

fn clock() -> SharedClock {
    Arc::new(SystemClock)
}

fn root() -> Material {
    Material::make(SystemClock.now()).unwrap()
}

fn plug(fake: &Fake, material: &Material, roots: &[&Material]) {
    let roots: String = roots.iter().map(|it| it.certificate.as_str()).collect();
    let data = [(CERTIFICATE, &material.certificate), (KEY, &material.key), (ROOTS, &roots)];
    let data = data.map(|(key, value)| (key.to_owned(), value.clone().into_bytes()));
    fake.0.lock().insert(PLUGGED.to_owned(), Data::from(data));
}

fn workload(authority: &Authority) -> WorkloadCertificate {
    let identity = Identity::new("cluster.local", "a", "b").unwrap();
    let request = CertificateRequest::new(&identity).unwrap();
    let issued = authority.issue(request.pem(), &identity, Duration::from_secs(60)).unwrap();
    WorkloadCertificate::from_answer(&identity, &request, &issued.chain, 0, SystemClock.now()).unwrap()
}

/// D52.
#[tokio::test]
async fn replicas_that_start_together_have_one_root() {
    let fake = Fake::default();
    let open = || Roots::open(fake.clone(), clock());
    let (a, b, c) = tokio::join!(open(), open(), open());
    let pems = [a, b, c].map(|it| it.unwrap().authority().root_pem());
    assert!(pems.iter().all(|pem| *pem == pems[0]));
    assert_eq!(fake.0.lock().keys().collect::<Vec<_>>(), [OWN]);
    assert_eq!(open().await.unwrap().authority().root_pem(), pems[0], "a later one takes it too");
}

/// D55. D52: what is plugged in wins, and the root before it stays trusted until its Secret is deleted.
#[tokio::test]
async fn a_plugged_in_root_wins_and_the_one_before_is_trusted_still() {
    let fake = Fake::default();
    let mut roots = Roots::open(fake.clone(), clock()).await.unwrap();
    let authority = roots.authority();
    let (before, old) = (authority.root_pem(), workload(&authority));
    let plugged = root();
    plug(&fake, &plugged, &[&plugged]);
    roots.refresh(true).await.unwrap();
    assert_eq!(authority.root_pem(), format!("{}{before}", plugged.certificate));
    let new = workload(&authority);
    assert_ne!(new.chain(), old.chain());
    fake.0.lock().remove(OWN);
    roots.refresh(true).await.unwrap();
    let retired = fake.0.lock()[RETIRED][ROOTS].clone();
    assert_eq!(String::from_utf8(retired).unwrap(), before, "kept until a person says otherwise");
    fake.0.lock().remove(RETIRED);
    roots.refresh(true).await.unwrap();
    assert_eq!(authority.root_pem(), plugged.certificate);
    // A replica that starts now has the same.
    assert_eq!(Roots::open(fake, clock()).await.unwrap().authority().root_pem(), plugged.certificate);
}

#[tokio::test]
async fn a_root_that_is_replaced_in_place_is_kept_by_all_and_written_by_the_leader() {
    let (fake, first, second) = (Fake::default(), root(), root());
    plug(&fake, &first, &[&first]);
    let mut leader = Roots::open(fake.clone(), clock()).await.unwrap();
    let mut other = Roots::open(fake.clone(), clock()).await.unwrap();
    let generation = other.authority().generation();
    plug(&fake, &second, &[&second]);
    other.refresh(false).await.unwrap();
    let both = format!("{}{}", second.certificate, first.certificate);
    assert_eq!(other.authority().root_pem(), both);
    assert!(generation.has_changed().unwrap());
    assert!(!fake.0.lock().contains_key(RETIRED));
    leader.refresh(true).await.unwrap();
    assert!(fake.0.lock().contains_key(RETIRED));
    other.refresh(false).await.unwrap();
    assert_eq!((leader.authority().root_pem(), other.authority().root_pem()), (both.clone(), both));
}

/// D52: nothing that is there and no good is replaced, or taken over.
#[tokio::test]
async fn a_bad_secret_changes_nothing() {
    let (fake, good, other) = (Fake::default(), root(), root());
    plug(&fake, &good, &[&good]);
    let mut roots = Roots::open(fake.clone(), clock()).await.unwrap();
    let authority = roots.authority();
    // The key of another one; a certificate that does not lead to the root; no key at all.
    let mixed = Material { key: other.key.clone(), ..good.clone() };
    plug(&fake, &mixed, &[&good]);
    let error = roots.refresh(true).await.unwrap_err().to_string();
    assert!(error.contains("cacerts") && error.contains("does not belong"), "{error}");
    plug(&fake, &other, &[&good]);
    let error = roots.refresh(true).await.unwrap_err().to_string();
    assert!(error.contains("not accepted under its roots"), "{error}");
    fake.0.lock().get_mut(PLUGGED).unwrap().remove(KEY);
    let error = roots.refresh(true).await.unwrap_err().to_string();
    assert!(error.contains("ca-key.pem is missing"), "{error}");
    assert_eq!(authority.root_pem(), good.certificate);
    workload(&authority);
    // At the start there is nothing that was good before.
    assert!(Roots::open(fake.clone(), clock()).await.is_err());
    assert!(!fake.0.lock().contains_key(OWN));
}

#[tokio::test]
async fn our_own_secret_is_put_back() {
    let fake = Fake::default();
    let mut roots = Roots::open(fake.clone(), clock()).await.unwrap();
    let before = fake.0.lock().remove(OWN).unwrap();
    roots.refresh(false).await.unwrap_err();
    assert_eq!(fake.0.lock()[OWN], before);
    roots.refresh(false).await.unwrap();
}
