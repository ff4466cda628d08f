//! What a waypoint is: a Gateway of a waypoint class with one listener (W01).

use serde_json::{Value, json};

use crate::args::ShapeArgs;
use crate::cluster::gather::objects::WAYPOINT_FOR;

/// Where HBONE is accepted.
const PORT: u16 = 15008;

/// The Gateway; without a namespace, it is for whichever it is applied to.
pub(super) fn gateway(shape: &ShapeArgs, namespace: Option<&str>) -> Value {
    let mut metadata = json!({ "name": shape.name });
    if let Some(namespace) = namespace {
        metadata["namespace"] = json!(namespace);
    }
    if let Some(traffic) = shape.traffic {
        metadata["labels"] = json!({ WAYPOINT_FOR: traffic.name() });
    }
    json!({
        "apiVersion": "gateway.networking.k8s.io/v1",
        "kind": "Gateway",
        "metadata": metadata,
        "spec": {
            "gatewayClassName": shape.class,
            "listeners": [{ "name": "mesh", "port": PORT, "protocol": "HBONE" }],
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::Traffic;
    use crate::output::yaml;

    /// K10.
    #[test]
    fn a_generated_waypoint_is_a_gateway_that_others_tools_take() {
        let shape = ShapeArgs {
            name: "waypoint".to_owned(),
            traffic: Some(Traffic::All),
            class: "culvert-waypoint".to_owned(),
        };
        let text = yaml(&gateway(&shape, Some("shop"))).unwrap();
        let back: Value = serde_saphyr::from_str(&text).unwrap();
        assert_eq!(
            back["metadata"],
            json!({"name": "waypoint", "namespace": "shop", "labels": {"istio.io/waypoint-for": "all"}})
        );
        assert_eq!(back["spec"]["listeners"], json!([{"name": "mesh", "port": 15008, "protocol": "HBONE"}]));
        let plain = gateway(&ShapeArgs { traffic: None, ..shape }, None);
        assert_eq!(plain["metadata"], json!({"name": "waypoint"}));
    }
}
