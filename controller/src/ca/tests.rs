mod issuing;
mod serving;

use std::sync::Arc;
use std::time::Duration;

use culvert_model::identity::Identity;
use culvert_runtime::clock::{SharedClock, SystemClock};

use super::Authority;

const HOUR: Duration = Duration::from_secs(3600);
const NAME: &str = "controller.culvert-system.svc";

fn workload(account: &str) -> Identity {
    Identity::new("cluster.local", "a", account).unwrap()
}

fn clock() -> SharedClock {
    Arc::new(SystemClock)
}

fn authority() -> (tempfile::TempDir, Arc<Authority>) {
    let dir = tempfile::tempdir().unwrap();
    let authority = Arc::new(Authority::open(&dir.path().join("ca"), clock()).unwrap());
    (dir, authority)
}
