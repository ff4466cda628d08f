//! Makes the certificate service's stubs; the messages themselves are culvert-proto's.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    const ROOT: &str = "../../proto/proto";
    println!("cargo:rerun-if-changed={ROOT}/ca.proto");
    let descriptors = protox::compile(["ca.proto"], [ROOT])?;
    tonic_prost_build::configure()
        .extern_path(".istio.v1.auth", "::culvert_proto::ca")
        .compile_fds(descriptors)?;
    Ok(())
}
