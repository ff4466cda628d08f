//! All routes by service, port and client, and the search among them.
//!
//! A search costs one lookup of the whole path, one for each of its segments, and a walk over the matches that are neither an
//! exact path nor a prefix: how many other routes there are does not matter.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use super::matching::{HttpMatch, PathMatch, RequestFacts, ValueMatch, precedence};
use super::{HttpRule, Route, StreamRule};
use crate::Str;
use crate::address::NamespacedHostname;

/// Every route that a waypoint knows. Immutable: [`Routes::with`] makes the next.
#[derive(Clone, Debug, Default)]
pub struct Routes {
    by_parent: imbl::HashMap<NamespacedHostname, Arc<Parent>>,
    /// The parent of each resource, to find it by its name.
    parents: imbl::HashMap<Str, NamespacedHostname>,
}

/// What a search for a request found.
#[derive(Clone, Copy, Debug)]
pub enum Found<'a> {
    /// The service has no route for this port and client.
    NoRoute,
    /// It has, and none of them is for this request.
    NoMatch,
    /// This rule is for it.
    Rule {
        /// Its route.
        route: &'a Arc<Route>,
        /// The rule.
        rule: &'a Arc<HttpRule>,
        /// Its match.
        matched: &'a HttpMatch,
    },
}

/// What a search for a stream found.
#[derive(Clone, Copy, Debug)]
pub enum FoundStream<'a> {
    /// The service has no such route for this port and client.
    NoRoute,
    /// It has, and none of them is for this server name.
    NoMatch,
    /// This rule is for it.
    Rule {
        /// Its route.
        route: &'a Arc<Route>,
        /// The rule.
        rule: &'a StreamRule,
    },
}

/// Routes by the names of their resources.
type ByName = BTreeMap<Str, Arc<Route>>;

/// The routes of one service.
#[derive(Debug, Default)]
struct Parent {
    routes: ByName,
    producer: Side,
    consumers: HashMap<Str, Side>,
}

/// Those of the producer, or of one consumer.
#[derive(Debug, Default)]
struct Side {
    every_port: Option<Table>,
    ports: HashMap<u16, Table>,
}

/// Those of one port.
#[derive(Debug, Default)]
struct Table {
    requests: Requests,
    /// In order of precedence.
    streams: Vec<Arc<Route>>,
}

#[derive(Debug, Default)]
struct Requests {
    /// In order of precedence.
    entries: Vec<Entry>,
    /// Entries by their exact path, each list in order.
    exact: HashMap<Str, Vec<usize>>,
    /// Entries by their prefix, likewise.
    prefix: HashMap<Str, Vec<usize>>,
    /// All others, in order.
    others: Vec<usize>,
}

#[derive(Debug)]
struct Entry {
    route: Arc<Route>,
    rule: usize,
    index: usize,
}

impl Routes {
    /// These routes without those named `removed`, and with `added` in the place of what has their names.
    #[must_use]
    pub fn with(&self, removed: &[Str], added: Vec<Route>) -> Self {
        let mut next = self.clone();
        let mut touched: HashMap<NamespacedHostname, ByName> = HashMap::new();
        let of = |parent: &NamespacedHostname| -> ByName {
            self.by_parent.get(parent).map(|known| known.routes.clone()).unwrap_or_default()
        };
        let gone = removed.iter().chain(added.iter().map(|route| &route.resource));
        for name in gone {
            if let Some(parent) = next.parents.remove(name) {
                touched.entry(parent).or_insert_with_key(of).remove(name);
            }
        }
        for route in added {
            next.parents.insert(route.resource.clone(), route.parent.clone());
            let routes = touched.entry(route.parent.clone()).or_insert_with_key(of);
            routes.insert(route.resource.clone(), Arc::new(route));
        }
        for (parent, routes) in touched {
            if routes.is_empty() {
                next.by_parent.remove(&parent);
            } else {
                next.by_parent.insert(parent, Arc::new(Parent::new(routes)));
            }
        }
        next
    }

    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.parents.len()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.parents.is_empty()
    }

    /// Every route, in no order.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<Route>> {
        self.by_parent.iter().flat_map(|(_, parent)| parent.routes.values())
    }

    /// The rule for a request to this port of a service, from a client of this namespace.
    #[must_use]
    pub fn find(
        &self,
        service: &NamespacedHostname,
        port: u16,
        client: Option<&str>,
        request: &RequestFacts<'_>,
    ) -> Found<'_> {
        match self.table(service, port, client, |table| !table.requests.entries.is_empty()) {
            None => Found::NoRoute,
            Some(table) => table.requests.find(request),
        }
    }

    /// The rule for a stream to this port of a service, from a client of this namespace that asks for this server name by TLS.
    #[must_use]
    pub fn find_stream(
        &self,
        service: &NamespacedHostname,
        port: u16,
        client: Option<&str>,
        server_name: Option<&str>,
    ) -> FoundStream<'_> {
        let Some(table) = self.table(service, port, client, |table| !table.streams.is_empty()) else {
            return FoundStream::NoRoute;
        };
        let found = table.streams.iter().find(|route| route.serves_name(server_name));
        match found.and_then(|route| Some((route, route.streams.first()?))) {
            Some((route, rule)) => FoundStream::Rule { route, rule },
            None => FoundStream::NoMatch,
        }
    }

    /// Whether there are routes for requests, and for streams, to this port from this client.
    #[must_use]
    pub fn kinds(&self, service: &NamespacedHostname, port: u16, client: Option<&str>) -> (bool, bool) {
        let requests = |table: &Table| !table.requests.entries.is_empty();
        let streams = |table: &Table| !table.streams.is_empty();
        (
            self.table(service, port, client, requests).is_some(),
            self.table(service, port, client, streams).is_some(),
        )
    }

    /// Whether a stream's server name has to be known to tell its route.
    #[must_use]
    pub fn wants_server_name(&self, service: &NamespacedHostname, port: u16, client: Option<&str>) -> bool {
        let named = |table: &Table| table.streams.iter().any(|route| !route.hostnames.is_empty());
        self.table(service, port, client, |table| !table.streams.is_empty()).is_some_and(named)
    }

    /// The consumer's own routes if it has any of this sort, else the producer's.
    fn table(
        &self,
        service: &NamespacedHostname,
        port: u16,
        client: Option<&str>,
        sort: impl Fn(&Table) -> bool,
    ) -> Option<&Table> {
        let parent = self.by_parent.get(service)?;
        let consumer = client.and_then(|client| parent.consumers.get(client));
        [consumer, Some(&parent.producer)].into_iter().flatten().find_map(|side| side.table(port, &sort))
    }
}

impl Parent {
    fn new(routes: ByName) -> Self {
        let side =
            |consumer: Option<&Str>| Side::new(routes.values().filter(|it| it.consumer.as_ref() == consumer));
        let names: BTreeSet<&Str> = routes.values().filter_map(|route| route.consumer.as_ref()).collect();
        let consumers = names.into_iter().map(|name| (name.clone(), side(Some(name)))).collect();
        Self { producer: side(None), consumers, routes }
    }
}

impl Side {
    fn new<'a>(routes: impl Iterator<Item = &'a Arc<Route>>) -> Self {
        let mut by_port: BTreeMap<Option<u16>, Vec<Arc<Route>>> = BTreeMap::new();
        for route in routes {
            by_port.entry(route.port).or_default().push(route.clone());
        }
        let every_port = by_port.remove(&None).map(Table::new);
        let ports =
            by_port.into_iter().filter_map(|(port, routes)| Some((port?, Table::new(routes)))).collect();
        Self { every_port, ports }
    }

    /// Routes that name the port go before those that name none, whatever they say.
    fn table(&self, port: u16, sort: &impl Fn(&Table) -> bool) -> Option<&Table> {
        [self.ports.get(&port), self.every_port.as_ref()].into_iter().flatten().find(|table| sort(table))
    }
}

impl Table {
    fn new(routes: Vec<Arc<Route>>) -> Self {
        let (http, mut streams): (Vec<_>, Vec<_>) = routes.into_iter().partition(|route| route.is_http());
        // TLS before TCP: the one that says more of the stream.
        streams.sort_by(|a, b| {
            let order = |route: &Arc<Route>| (route.kind != super::RouteKind::Tls, route.created);
            order(a).cmp(&order(b)).then_with(|| (&a.namespace, &a.name).cmp(&(&b.namespace, &b.name)))
        });
        Self { requests: Requests::new(&http), streams }
    }
}

impl Requests {
    fn new(routes: &[Arc<Route>]) -> Self {
        let mut ranked = Vec::new();
        for route in routes {
            for (rule, of) in route.http.iter().enumerate() {
                for (index, one) in of.matches.iter().enumerate() {
                    ranked.push((one.rank(), Entry { route: route.clone(), rule, index }));
                }
            }
        }
        ranked.sort_by(|(a, at), (b, bt)| {
            precedence((a, &at.route, (at.rule, at.index)), (b, &bt.route, (bt.rule, bt.index)))
        });
        let mut made =
            Self { entries: ranked.into_iter().map(|(_, entry)| entry).collect(), ..Self::default() };
        for (at, entry) in made.entries.iter().enumerate() {
            match &entry.matched().path {
                PathMatch::Exact(path) => made.exact.entry(path.clone()).or_default().push(at),
                PathMatch::Any => made.prefix.entry("".into()).or_default().push(at),
                PathMatch::Prefix(prefix) => made.prefix.entry(prefix.clone()).or_default().push(at),
                PathMatch::Grpc(grpc) => match (&grpc.service, &grpc.method) {
                    (Some(ValueMatch::Exact(service)), Some(ValueMatch::Exact(method))) => {
                        made.exact.entry(format!("/{service}/{method}").into()).or_default().push(at);
                    }
                    _ => made.others.push(at),
                },
                PathMatch::Regex(_) => made.others.push(at),
            }
        }
        made
    }

    fn find(&self, request: &RequestFacts<'_>) -> Found<'_> {
        let mut best = usize::MAX;
        let mut consider = |among: Option<&Vec<usize>>, whole: bool| {
            let fits = |at: &&usize| {
                let matched = self.entries[**at].matched();
                if whole { matched.matches(request) } else { matched.rest_matches(request) }
            };
            let better = among.into_iter().flatten().take_while(|at| **at < best);
            if let Some(at) = better.into_iter().find(fits) {
                best = *at;
            }
        };
        consider(self.exact.get(request.path), false);
        consider(Some(&self.others), true);
        // The path itself, and what is before each of its slashes: `/a/b`, `/a`, and the empty text for the root.
        let path = request.path;
        consider(self.prefix.get(path), false);
        for (slash, _) in path.rmatch_indices('/') {
            consider(self.prefix.get(&path[..slash]), false);
        }
        match self.entries.get(best) {
            None => Found::NoMatch,
            Some(entry) => Found::Rule {
                route: &entry.route,
                rule: &entry.route.http[entry.rule],
                matched: entry.matched(),
            },
        }
    }
}

impl Entry {
    fn matched(&self) -> &HttpMatch {
        &self.route.http[self.rule].matches[self.index]
    }
}
