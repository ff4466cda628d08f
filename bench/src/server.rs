//! The measured server: as little as possible of its own.

use std::net::SocketAddr;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

use crate::protocol::{CHUNK, ECHO, ONE, REQUEST, RESPONSE, SINK, SOURCE};

/// Serves until it is ended.
pub async fn serve(listen: SocketAddr) -> anyhow::Result<()> {
    let listener = TcpListener::bind(listen).await?;
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => {
                if let Ok((stream, _)) = accepted {
                    connections.spawn(connection(stream));
                }
            }
            Some(_) = connections.join_next() => {}
        }
    }
}

async fn connection(mut stream: TcpStream) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    match stream.read_u8().await? {
        SINK => {
            let mut buffer = vec![0; CHUNK];
            let mut total = 0u64;
            loop {
                match stream.read(&mut buffer).await? {
                    0 => break,
                    length => total += length as u64,
                }
            }
            stream.write_u64(total).await
        }
        SOURCE => {
            let chunk = vec![b'x'; CHUNK];
            // The client leaves when it has enough.
            while stream.write_all(&chunk).await.is_ok() {}
            Ok(())
        }
        ECHO => {
            let (mut request, response) = ([0; REQUEST], [b'x'; RESPONSE]);
            while stream.read_exact(&mut request).await.is_ok() {
                stream.write_all(&response).await?;
            }
            Ok(())
        }
        ONE => {
            stream.read_exact(&mut [0; REQUEST]).await?;
            stream.write_all(&[b'x'; RESPONSE]).await
        }
        _ => Ok(()),
    }
}
