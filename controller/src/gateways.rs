//! Which Gateways are waypoints of this mesh, and what they are called: what provisioning, binding and status agree on.

use culvert_k8s_api::gateway::{Gateway, GatewayClass, HBONE, Listener};
use culvert_k8s_api::labels;
use culvert_k8s_api::values::is_dns_label;

/// What writes `status`, and whose classes are ours.
pub const CONTROLLER: &str = "culvert.dev/waypoint-controller";
/// The class that the chart makes.
pub const CLASS: &str = "culvert-waypoint";
/// Of Istio's class of waypoints; ours too where that is set.
pub const COMPAT_CONTROLLER: &str = "istio.io/mesh-controller";
/// Istio's class of waypoints.
pub const COMPAT_CLASS: &str = "istio-waypoint";
/// The value of [`labels::GATEWAY_MANAGED`] on what is ours. Another mesh has another, so that neither touches what is the other's.
pub const MANAGED: &str = "culvert.dev-waypoint-controller";
/// Where a waypoint takes tunnels.
pub const HBONE_PORT: u16 = 15008;

/// What is known of a class by a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Owner {
    /// This mesh looks after its Gateways.
    Us,
    /// Somebody else does.
    Other,
    /// There is no such class, and its name is none of ours: nobody can say.
    Unknown,
}

/// Whose the Gateways of a class are. A class of our own name is ours even if there is no object for it: the chart can only make
/// one if the Gateway API was there before it.
pub fn owner(name: &str, class: Option<&GatewayClass>, compat: bool) -> Owner {
    let Some(class) = class else {
        let ours = name == CLASS || (compat && name == COMPAT_CLASS);
        return if ours { Owner::Us } else { Owner::Unknown };
    };
    let controller = class.spec.controller_name.as_str();
    let ours = controller == CONTROLLER || (compat && controller == COMPAT_CONTROLLER);
    if ours { Owner::Us } else { Owner::Other }
}

/// Whether somebody else runs what stands behind a Gateway (D61): its addresses are written down.
pub fn has_own_addresses(gateway: &Gateway) -> bool {
    !gateway.spec.addresses.is_empty()
}

/// What Deployment, Service and the rest are called (D62).
///
/// # Errors
/// In words, if it is no name that a Service can have.
pub fn name_of(gateway: &Gateway) -> Result<&str, String> {
    let overridden = gateway.metadata.annotations.get(labels::NAME_OVERRIDE);
    let name = overridden.unwrap_or(&gateway.metadata.name);
    if is_dns_label(name) && name.starts_with(|first: char| first.is_ascii_lowercase()) {
        return Ok(name);
    }
    let what = if overridden.is_some() { labels::NAME_OVERRIDE } else { "metadata.name" };
    Err(format!(
        "{what} {name:?} is no name for a Service: at most 63 lower case letters, digits and -, beginning with a letter"
    ))
}

/// The listener that takes tunnels and its port as clients have it; without one, a Gateway is no waypoint.
pub fn hbone(gateway: &Gateway) -> Option<(&Listener, u16)> {
    gateway.hbone().map(|it| (it, it.port.get()))
}

/// Whether a listener is one that a waypoint has.
pub fn supported(listener: &Listener) -> bool {
    listener.protocol == HBONE
}

#[cfg(test)]
mod tests {
    use culvert_k8s_api::ObjectMeta;
    use culvert_k8s_api::gateway::GatewayClassSpec;

    use super::*;

    fn class(controller: &str) -> GatewayClass {
        let spec = GatewayClassSpec { controller_name: controller.to_owned(), parameters_ref: None };
        GatewayClass { metadata: ObjectMeta::default(), spec }
    }

    /// D64.
    #[test]
    fn a_class_belongs_to_who_its_controller_name_says() {
        let (own, istio, other) = (class(CONTROLLER), class(COMPAT_CONTROLLER), class("example.com/x"));
        assert_eq!(owner("any", Some(&own), false), Owner::Us);
        assert_eq!(owner(COMPAT_CLASS, Some(&istio), false), Owner::Other);
        assert_eq!(owner(COMPAT_CLASS, Some(&istio), true), Owner::Us);
        assert_eq!(owner(CLASS, Some(&other), true), Owner::Other);
        assert_eq!(owner(CLASS, None, false), Owner::Us);
        assert_eq!(owner(COMPAT_CLASS, None, false), Owner::Unknown);
        assert_eq!(owner(COMPAT_CLASS, None, true), Owner::Us);
        assert_eq!(owner("istio", None, true), Owner::Unknown);
    }

    /// D62.
    #[test]
    fn what_is_made_for_a_gateway_is_called_as_it_says() {
        let mut gateway = Gateway::default();
        gateway.metadata.name = "w".to_owned();
        assert_eq!(name_of(&gateway), Ok("w"));
        gateway.metadata.name = "w.x".to_owned();
        assert!(name_of(&gateway).unwrap_err().contains("metadata.name \"w.x\""));
        gateway.metadata.annotations.insert(labels::NAME_OVERRIDE.to_owned(), "other".to_owned());
        assert_eq!(name_of(&gateway), Ok("other"));
        gateway.metadata.annotations.insert(labels::NAME_OVERRIDE.to_owned(), "9".to_owned());
        assert!(name_of(&gateway).unwrap_err().contains("name-override"));
    }
}
