//! Numbers of the nf_tables wire format, from the kernel's `linux/netfilter/nf_tables.h`.

use super::expr::{Cmp, Ct, Meta, Verdict};

pub(crate) const SUBSYSTEM: u16 = 10;
pub(crate) const BATCH_BEGIN: u16 = 0x10;
pub(crate) const BATCH_END: u16 = 0x11;
pub(crate) const MULTICAST_GROUP: u32 = 7;

pub(crate) const NEW_TABLE: u16 = 0;
pub(crate) const DEL_TABLE: u16 = 2;
pub(crate) const NEW_CHAIN: u16 = 3;
pub(crate) const GET_CHAIN: u16 = 4;
pub(crate) const NEW_RULE: u16 = 6;
pub(crate) const GET_RULE: u16 = 7;
pub(crate) const NEW_SET: u16 = 9;
pub(crate) const NEW_SET_ELEM: u16 = 12;
pub(crate) const GET_SET_ELEM: u16 = 13;
pub(crate) const NEW_GEN: u16 = 15;

pub(crate) const NFPROTO_INET: u8 = 1;
pub(crate) const NFPROTO_IPV4: u8 = 2;
pub(crate) const NFPROTO_IPV6: u8 = 10;

pub(crate) const LIST_ELEM: u16 = 1;

pub(crate) const TABLE_NAME: u16 = 1;
pub(crate) const TABLE_FLAGS: u16 = 2;
/// The table belongs to the netlink socket that made it: nobody else changes it, and it goes with the socket (kernel 5.12).
pub(crate) const TABLE_FLAG_OWNER: u32 = 2;

pub(crate) const CHAIN_TABLE: u16 = 1;
pub(crate) const CHAIN_NAME: u16 = 3;
pub(crate) const CHAIN_HOOK: u16 = 4;
pub(crate) const CHAIN_POLICY: u16 = 5;
pub(crate) const CHAIN_TYPE: u16 = 7;
pub(crate) const HOOK_NUM: u16 = 1;
pub(crate) const HOOK_PRIORITY: u16 = 2;
pub(crate) const HOOK_DEV: u16 = 3;

pub(crate) const RULE_TABLE: u16 = 1;
pub(crate) const RULE_CHAIN: u16 = 2;
pub(crate) const RULE_EXPRESSIONS: u16 = 4;
pub(crate) const RULE_USERDATA: u16 = 7;
pub(crate) const EXPR_NAME: u16 = 1;
pub(crate) const EXPR_DATA: u16 = 2;

pub(crate) const SET_TABLE: u16 = 1;
pub(crate) const SET_NAME: u16 = 2;
pub(crate) const SET_FLAGS: u16 = 3;
pub(crate) const SET_KEY_TYPE: u16 = 4;
pub(crate) const SET_KEY_LEN: u16 = 5;
pub(crate) const SET_ID: u16 = 10;
pub(crate) const SET_FLAG_CONSTANT: u32 = 2;
pub(crate) const SET_FLAG_INTERVAL: u32 = 4;
pub(crate) const SET_ELEM_LIST_TABLE: u16 = 1;
pub(crate) const SET_ELEM_LIST_SET: u16 = 2;
pub(crate) const SET_ELEM_LIST_ELEMENTS: u16 = 3;
pub(crate) const SET_ELEM_KEY: u16 = 1;
pub(crate) const SET_ELEM_FLAGS: u16 = 3;
pub(crate) const SET_ELEM_INTERVAL_END: u32 = 1;

pub(crate) const GEN_PROC_PID: u16 = 2;
pub(crate) const GEN_PROC_NAME: u16 = 3;

pub(crate) const REG_VERDICT: u32 = 0;
pub(crate) const REG_1: u32 = 1;
pub(crate) const REG_2: u32 = 2;
/// The second four bytes of register 1.
pub(crate) const REG32_01: u32 = 9;

pub(crate) const META_DREG: u16 = 1;
pub(crate) const META_KEY: u16 = 2;
pub(crate) const META_SREG: u16 = 3;
pub(crate) const CT_DREG: u16 = 1;
pub(crate) const CT_KEY: u16 = 2;
pub(crate) const CT_DIRECTION: u16 = 3;
pub(crate) const CT_SREG: u16 = 4;
pub(crate) const CT_ORIGINAL: u8 = 0;
pub(crate) const PAYLOAD_DREG: u16 = 1;
pub(crate) const PAYLOAD_BASE: u16 = 2;
pub(crate) const PAYLOAD_OFFSET: u16 = 3;
pub(crate) const PAYLOAD_LEN: u16 = 4;
pub(crate) const NETWORK_HEADER: u32 = 1;
pub(crate) const TRANSPORT_HEADER: u32 = 2;
pub(crate) const CMP_SREG: u16 = 1;
pub(crate) const CMP_OP: u16 = 2;
pub(crate) const CMP_DATA: u16 = 3;
pub(crate) const BITWISE_SREG: u16 = 1;
pub(crate) const BITWISE_DREG: u16 = 2;
pub(crate) const BITWISE_LEN: u16 = 3;
pub(crate) const BITWISE_MASK: u16 = 4;
pub(crate) const BITWISE_XOR: u16 = 5;
pub(crate) const LOOKUP_SET: u16 = 1;
pub(crate) const LOOKUP_SREG: u16 = 2;
pub(crate) const LOOKUP_FLAGS: u16 = 5;
pub(crate) const IMMEDIATE_DREG: u16 = 1;
pub(crate) const IMMEDIATE_DATA: u16 = 2;
pub(crate) const COUNTER_PACKETS: u16 = 2;
pub(crate) const SOCKET_KEY: u16 = 1;
pub(crate) const SOCKET_DREG: u16 = 2;
pub(crate) const SOCKET_LEVEL: u16 = 3;
pub(crate) const SOCKET_CGROUP_V2: u32 = 3;
pub(crate) const DATA_VALUE: u16 = 1;
pub(crate) const DATA_VERDICT: u16 = 2;
pub(crate) const VERDICT_CODE: u16 = 1;
pub(crate) const VERDICT_CHAIN: u16 = 2;
pub(crate) const NG_DREG: u16 = 1;
pub(crate) const NG_MODULUS: u16 = 2;
pub(crate) const NG_TYPE: u16 = 3;
pub(crate) const NG_OFFSET: u16 = 4;
pub(crate) const NG_RANDOM: u32 = 1;
pub(crate) const REDIR_PROTO_MIN: u16 = 1;
pub(crate) const REDIR_PROTO_MAX: u16 = 2;
pub(crate) const REDIR_FLAGS: u16 = 3;
pub(crate) const NAT_TYPE: u16 = 1;
pub(crate) const NAT_FAMILY: u16 = 2;
pub(crate) const NAT_ADDR_MIN: u16 = 3;
pub(crate) const NAT_ADDR_MAX: u16 = 4;
pub(crate) const NAT_PROTO_MIN: u16 = 5;
pub(crate) const NAT_PROTO_MAX: u16 = 6;
pub(crate) const NAT_FLAGS: u16 = 7;
pub(crate) const NAT_SNAT: u32 = 0;
pub(crate) const NAT_DNAT: u32 = 1;
pub(crate) const NAT_ADDRESS_SPECIFIED: u32 = 1;
pub(crate) const NAT_PORT_SPECIFIED: u32 = 2;

/// The comment of a rule, in the type-length-value format of its user data.
pub(crate) const USERDATA_COMMENT: u8 = 0;

pub(crate) const fn meta(key: Meta) -> u32 {
    match key {
        Meta::Mark => 3,
        Meta::IifName => 6,
        Meta::OifName => 7,
        Meta::SkUid => 10,
        Meta::NfProto => 15,
        Meta::L4Proto => 16,
    }
}

pub(crate) const fn ct(key: Ct) -> u32 {
    match key {
        Ct::State => 0,
        Ct::Direction => 1,
        Ct::Status => 2,
        Ct::Mark => 3,
        Ct::Zone => 17,
    }
}

pub(crate) const fn cmp(op: Cmp) -> u32 {
    match op {
        Cmp::Eq => 0,
        Cmp::Ne => 1,
        Cmp::Lt => 2,
        Cmp::Gt => 4,
    }
}

pub(crate) const fn verdict(verdict: &Verdict) -> u32 {
    let code: i32 = match verdict {
        Verdict::Drop => 0,
        Verdict::Accept => 1,
        Verdict::Jump(_) => -3,
        Verdict::Goto(_) => -4,
        Verdict::Return => -5,
    };
    code.cast_unsigned()
}

// reject
pub(crate) const REJECT_TYPE: u16 = 1;
pub(crate) const REJECT_ICMP_CODE: u16 = 2;
pub(crate) const REJECT_ICMPX_UNREACH: u32 = 2;
pub(crate) const REJECT_ICMPX_PORT_UNREACH: u8 = 1;
