//! Makes the prost messages from `proto/*.proto`, without a protoc on the machine.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let files = ["workload", "authorization", "zds", "ca", "discovery", "culvert"]
        .map(|name| format!("proto/{name}.proto"));
    println!("cargo:rerun-if-changed=proto");
    let descriptors = protox::compile(&files, ["proto"])?;
    let mut config = prost_build::Config::new();
    // Resource bodies are kept as slices of the received frame until someone needs them.
    config.bytes([".google.protobuf.Any.value"]);
    config.compile_fds(descriptors)?;
    Ok(())
}
