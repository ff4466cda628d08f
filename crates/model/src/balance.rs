//! Which endpoint of a service gets a connection.
