//! Makes the client and server of the delta discovery service; their messages are culvert-proto's.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    const PROTO: &str = "../../proto/proto";
    println!("cargo:rerun-if-changed={PROTO}");
    let descriptors = protox::compile(["discovery.proto"], [PROTO])?;
    let mut config = prost_build::Config::new();
    config.extern_path(".envoy.service.discovery.v3", "::culvert_proto::discovery");
    tonic_prost_build::configure().compile_fds_with_config(descriptors, config)?;
    Ok(())
}
