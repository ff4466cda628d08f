//! Makes the prost messages from `proto/*.proto`, without a protoc on the machine.

use prost::Message;

#[allow(clippy::disallowed_methods, reason = "what cargo tells a build is in the environment")]
fn main() -> Result<(), Box<dyn std::error::Error>> {
    let files = ["workload", "authorization", "zds", "ca", "discovery", "culvert", "waypoint"]
        .map(|name| format!("proto/{name}.proto"));
    println!("cargo:rerun-if-changed=proto");
    let descriptors = protox::compile(&files, ["proto"])?;
    let out = std::path::PathBuf::from(std::env::var_os("OUT_DIR").ok_or("cargo sets OUT_DIR")?);
    // Without comments: for reading and writing JSON only names and numbers count.
    let mut bare = descriptors.clone();
    bare.file.iter_mut().for_each(|file| file.source_code_info = None);
    std::fs::write(out.join("descriptors.bin"), bare.encode_to_vec())?;
    let mut config = prost_build::Config::new();
    // Bodies are shared: a server's by all its streams, a client's with the received frame until someone decodes them.
    config.extern_path(".google.protobuf.Any", "crate::Any");
    config.compile_fds(descriptors)?;
    Ok(())
}
