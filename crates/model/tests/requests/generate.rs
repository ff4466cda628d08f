//! Random policies and requests over small alphabets, so that they often meet.

use culvert_model::request::{Authority, normalise};
use culvert_proto::waypoint as proto;

use crate::world::{Request, identity, service};

/// A small generator (splitmix64): the same seed gives the same case, on every machine.
pub struct Dice(u64);

/// Requested paths, and what they are by the rules of normalisation, by hand.
pub const PATHS: &[(&str, &str)] = &[
    ("/", "/"),
    ("/a", "/a"),
    ("/a/", "/a/"),
    ("/a/b", "/a/b"),
    ("/a/b/c", "/a/b/c"),
    ("/b", "/b"),
    ("//a", "/a"),
    ("/x/../a", "/a"),
    ("/a%2fb?q=/a", "/a/b"),
    ("/%61/./b", "/a/b"),
    ("/a%3b", "/a%3B"),
    ("/c.txt?*", "/c.txt"),
];

/// Paths in policies, and the pattern that is meant, by hand.
pub const PATH_PATTERNS: &[(&str, &str)] = &[
    ("/a", "/a"),
    ("/a*", "/a*"),
    ("/a/*", "/a/*"),
    ("*b", "*b"),
    ("*/", "*/"),
    ("*", "*"),
    ("/b", "/b"),
    ("//%61/./b", "/a/b"),
    ("/a%3b", "/a%3B"),
    ("*.t%78t", "*.txt"),
    ("/{*}", "/{*}"),
    ("/a/{*}", "/a/{*}"),
    ("/{**}/b", "/{**}/b"),
    ("/a/{**}", "/a/{**}"),
    ("/{*}/{**}", "/{*}/{**}"),
];

const IDENTITIES: &[&str] = &["d/ns/a/sa/x", "d/ns/ab/sa/x", "e/ns/a/sa/y", "e/ns/b/sa/xy"];
const ADDRESSES: &[&str] = &["10.0.0.1", "10.0.1.1", "10.9.0.1", "fd00::1", "::ffff:10.0.0.1"];
const BLOCKS: &[&str] =
    &["10.0.0.1", "10.0.0.0/24", "10.0.0.7/16", "0.0.0.0/0", "fd00::/16", "::/0", "::ffff:10.0.0.0/120"];
const HOSTS: &[&str] = &["shop", "SHOP:80", "shop.", "shop.a", "shop.a.:8080", "cart"];
const HOST_PATTERNS: &[&str] = &["shop", "Shop:*", "shop*", "*.a", "*.A:8080", "cart", "*", "shop."];
const METHODS: &[&str] = &["GET", "POST", "PUT", "get"];
const NAMES: &[&str] = &["x-a", "x-b", "cookie"];
const VALUES: &[&str] = &["v", "w", "vw", "v,w", "v; w", ""];
const TOKENS: &[&str] = &[
    r#"{"iss":"i","sub":"s"}"#,
    r#"{"iss":"i","sub":"t/s","aud":"v"}"#,
    r#"{"iss":"i/t","sub":"s","aud":["w","v"],"azp":"v"}"#,
    r#"{"iss":"j","aud":[],"groups":["v","vw"],"realm":{"roles":["w",1]}}"#,
    r#"{"iss":"j","sub":"","groups":true,"realm":{"roles":7}}"#,
    r#"{"groups":"","realm":"v","sub":"s","azp":["v",null,["w"]]}"#,
];
const PRINCIPALS: &[&str] = &["i/s", "i/t/s", "i/*", "i/t/*", "i*", "*/s", "*s", "*", "j/*"];
const SERVER_NAMES: &[&str] = &["shop", "Shop.a", "cart", ""];
const KEYS: &[&str] = &[
    "source.ip",
    "remote.ip",
    "destination.ip",
    "destination.port",
    "source.namespace",
    "source.serviceAccount",
    "source.trustDomain",
    "source.principal",
    "request.auth.principal",
    "request.auth.audiences",
    "request.auth.presenter",
    "request.auth.claims[groups]",
    "request.auth.claims[realm][roles]",
    "request.auth.claims[realm]",
    "connection.sni",
    "request.headers[X-A]",
    "request.headers[x-b]",
    "request.headers[Cookie]",
    "request.headers[host]",
    "request.headers[:method]",
    "experimental.envoy.filters.a[b]",
];

impl Dice {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15))
    }

    fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        usize::try_from((z ^ (z >> 31)) % bound as u64).unwrap()
    }

    fn one_in(&mut self, bound: usize) -> bool {
        self.below(bound) == 0
    }

    fn pick<'a>(&mut self, from: &[&'a str]) -> &'a str {
        from[self.below(from.len())]
    }

    fn many<T>(&mut self, at_most: usize, mut one: impl FnMut(&mut Self) -> T) -> Vec<T> {
        (0..self.below(at_most + 1)).map(|_| one(self)).collect()
    }

    /// One of the texts, its beginning, its end, or anything.
    fn text(&mut self, from: &[&str]) -> String {
        let whole = self.pick(from);
        let cut = self.below(whole.len() + 1);
        match self.below(5) {
            0 => "*".into(),
            1 => format!("{}*", &whole[..cut]),
            2 => format!("*{}", &whole[cut..]),
            _ if whole.is_empty() => "*".into(),
            _ => whole.into(),
        }
    }

    fn principal(&mut self) -> String {
        let text = self.text(IDENTITIES);
        if self.one_in(4) && !text.starts_with('*') { format!("spiffe://{text}") } else { text }
    }

    fn account(&mut self) -> String {
        self.pick(&["a/x", "x", "ab/x", "y", "b/xy"]).to_owned()
    }

    fn namespace(&mut self) -> String {
        self.pick(&["a", "ab", "a*", "*b", "*", "b", "a*b"]).to_owned()
    }

    fn path(&mut self) -> String {
        PATH_PATTERNS[self.below(PATH_PATTERNS.len())].0.to_owned()
    }

    pub fn policies(&mut self) -> Vec<proto::Policy> {
        let count = 1 + self.below(3);
        ["p0", "p1", "p2"].iter().take(count).map(|name| self.policy(name)).collect()
    }

    pub fn policy(&mut self, name: &str) -> proto::Policy {
        use proto::policy::Action;
        let actions = [Action::Allow, Action::Allow, Action::Allow, Action::Deny, Action::Deny];
        let action = match self.below(12) {
            0 => Action::Audit,
            1 => Action::Custom,
            at => actions[at % actions.len()],
        };
        let provider = if action == Action::Custom { self.pick(&["p", "q"]) } else { "" };
        let ours = service();
        let target = |dice: &mut Self| proto::Target {
            service_namespace: ours.namespace.to_string(),
            service_hostname: if dice.one_in(2) { "cart.a" } else { &*ours.hostname }.into(),
        };
        proto::Policy {
            namespace: "a".into(),
            name: name.into(),
            action: action.into(),
            provider: provider.into(),
            dry_run: self.one_in(8),
            targets: if self.one_in(3) { self.many(2, target) } else { vec![] },
            rules: self.many(2, Self::rule),
        }
    }

    fn rule(&mut self) -> proto::PolicyRule {
        proto::PolicyRule {
            from: self.many(2, Self::source),
            to: self.many(2, Self::operation),
            when: if self.one_in(2) { self.many(2, Self::condition) } else { vec![] },
        }
    }

    /// One list nearly always, and rarely an element that asks for nothing.
    fn source(&mut self) -> proto::Source {
        let mut s = proto::Source::default();
        for _ in 0..1 + self.below(2) {
            match self.below(12) {
                0 => s.principals = self.some(Self::principal),
                1 => s.not_principals = self.some(Self::principal),
                2 => s.request_principals = self.some(|dice| dice.pick(PRINCIPALS).into()),
                3 => s.not_request_principals = self.some(|dice| dice.pick(PRINCIPALS).into()),
                4 => s.namespaces = self.some(Self::namespace),
                5 => s.not_namespaces = self.some(Self::namespace),
                6 => s.service_accounts = self.some(Self::account),
                7 => s.not_service_accounts = self.some(Self::account),
                8 => s.ip_blocks = self.some(|dice| dice.pick(BLOCKS).into()),
                9 => s.not_ip_blocks = self.some(|dice| dice.pick(BLOCKS).into()),
                10 => s.remote_ip_blocks = self.some(|dice| dice.pick(BLOCKS).into()),
                _ => s.not_remote_ip_blocks = self.some(|dice| dice.pick(BLOCKS).into()),
            }
        }
        if self.one_in(200) { proto::Source::default() } else { s }
    }

    fn operation(&mut self) -> proto::Operation {
        let mut o = proto::Operation::default();
        for _ in 0..1 + self.below(2) {
            match self.below(8) {
                0 => o.hosts = self.some(|dice| dice.pick(HOST_PATTERNS).into()),
                1 => o.not_hosts = self.some(|dice| dice.pick(HOST_PATTERNS).into()),
                2 => o.ports = self.some(|dice| [80, 443][dice.below(2)]),
                3 => o.not_ports = self.some(|dice| [80, 443][dice.below(2)]),
                4 => o.methods = self.some(|dice| dice.text(METHODS)),
                5 => o.not_methods = self.some(|dice| dice.text(METHODS)),
                6 => o.paths = self.some(Self::path),
                _ => o.not_paths = self.some(Self::path),
            }
        }
        o
    }

    fn condition(&mut self) -> proto::Condition {
        let known = if self.one_in(20) { KEYS.len() } else { KEYS.len() - 1 };
        let key = self.pick(&KEYS[..known]);
        let value = |dice: &mut Self| match key {
            "source.ip" | "remote.ip" | "destination.ip" => dice.pick(BLOCKS).to_owned(),
            "destination.port" => dice.pick(&["80", "443"]).to_owned(),
            "source.namespace" => dice.namespace(),
            "source.serviceAccount" => dice.account(),
            "source.trustDomain" => dice.text(&["d", "e"]),
            "source.principal" => dice.principal(),
            "request.auth.principal" => dice.pick(PRINCIPALS).to_owned(),
            "connection.sni" => dice.text(&["shop", "SHOP.A", "cart"]),
            "request.headers[host]" => dice.pick(HOST_PATTERNS).to_owned(),
            "request.headers[:method]" => dice.text(METHODS),
            _ => dice.text(&["v", "w", "vw", "v,w", "v; w", "1", "true"]),
        };
        let (values, not_values) = match self.below(4) {
            0 => (self.some(value), self.some(value)),
            1 => (vec![], self.some(value)),
            _ => (self.some(value), vec![]),
        };
        proto::Condition { key: key.into(), values, not_values }
    }

    fn some<T>(&mut self, mut one: impl FnMut(&mut Self) -> T) -> Vec<T> {
        (0..1 + self.below(2)).map(|_| one(self)).collect()
    }

    pub fn request(&mut self) -> Request {
        let mut request = Request::usual().path(PATHS[self.below(PATHS.len())].0);
        let address = |dice: &mut Self| (!dice.one_in(12)).then(|| dice.pick(ADDRESSES).parse().unwrap());
        request.identity = (!self.one_in(6)).then(|| identity(self.pick(IDENTITIES)));
        (request.source, request.remote) = (address(self), address(self));
        request.destination = self
            .pick(&["10.0.0.1:80", "10.9.0.1:443", "[fd00::1]:80", "[::ffff:10.0.0.1]:8080"])
            .parse()
            .unwrap();
        request.server_name = self.one_in(2).then(|| self.pick(SERVER_NAMES).into());
        if self.one_in(2) {
            request = request.claims(self.pick(TOKENS));
        }
        for _ in 0..self.below(4) {
            request = request.header(self.pick(NAMES), self.pick(VALUES));
        }
        let authority = (!self.one_in(10)).then(|| Authority::parse(self.pick(HOSTS)).unwrap());
        let method = self.pick(METHODS).to_owned();
        request = request.http(|http| (http.authority, http.method) = (authority, method));
        if self.one_in(10) {
            request.http = None;
        }
        request
    }
}

/// The tables that are written by hand are right, where the rules of normalisation are.
#[test]
fn the_requested_paths_are_what_they_are_said_to_be() {
    for (target, path) in PATHS {
        assert_eq!(normalise(target).unwrap().path(), *path, "{target}");
    }
}
