//! What a Service is for a control plane of several replicas: one address, behind it whichever is there.

use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};

use anyhow::Result;
use culvert_runtime::tasks::Tasks;
use tokio::io::copy_bidirectional;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

pub struct Relay {
    /// Where it listens, on 127.0.0.1.
    pub port: u16,
    to: Arc<AtomicU16>,
    cut: watch::Sender<()>,
}

impl Relay {
    pub async fn start(tasks: &Tasks, to: u16) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let port = listener.local_addr()?.port();
        let (to, cut) = (Arc::new(AtomicU16::new(to)), watch::Sender::new(()));
        let (target, cuts, spawn) = (to.clone(), cut.clone(), tasks.clone());
        tasks.spawn("relay", async move {
            while let Ok((mut client, _)) = listener.accept().await {
                let (to, mut cut) = (target.load(Ordering::SeqCst), cuts.subscribe());
                spawn.spawn("relayed", async move {
                    let Ok(mut server) = TcpStream::connect(("127.0.0.1", to)).await else { return };
                    tokio::select! {
                        _ = copy_bidirectional(&mut client, &mut server) => {}
                        _ = cut.changed() => {}
                    }
                });
            }
        });
        Ok(Self { port, to, cut })
    }

    /// Ends every connection; new ones go to another port.
    pub fn switch(&self, to: u16) {
        self.to.store(to, Ordering::SeqCst);
        self.cut.send_replace(());
    }
}
