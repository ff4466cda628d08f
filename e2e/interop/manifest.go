package main

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"sort"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"istio.io/istio/pkg/workloadapi"
	"istio.io/istio/pkg/workloadapi/security"
)

const (
	addressType       = "type.googleapis.com/istio.workload.Address"
	authorizationType = "type.googleapis.com/istio.security.Authorization"
)

// manifest is the file of serve-xds. Workloads, services and policies are protojson; raw resources are sent as they are, so that a
// proxy can be shown bytes no encoder would write.
type manifest struct {
	Workloads []json.RawMessage `json:"workloads"`
	Services  []json.RawMessage `json:"services"`
	Policies  []json.RawMessage `json:"policies"`
	Raw       []rawResource     `json:"raw"`
}

type rawResource struct {
	Type  string `json:"type"`
	Name  string `json:"name"`
	Value []byte `json:"value"` // base64
}

// resources of one type, by name.
type resources map[string]*discovery.Resource

// loadManifest reads every resource of the file, by type URL.
func loadManifest(file string) (map[string]resources, error) {
	text, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	var parsed manifest
	if err := json.Unmarshal(text, &parsed); err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	loaded := map[string]resources{addressType: {}, authorizationType: {}}
	for index, text := range parsed.Workloads {
		workload := &workloadapi.Workload{}
		if err := protojson.Unmarshal(text, workload); err != nil {
			return nil, fmt.Errorf("%s: workloads[%d]: %w", file, index, err)
		}
		address := &workloadapi.Address{Type: &workloadapi.Address_Workload{Workload: workload}}
		if err := loaded[addressType].add(workload.Uid, workloadAliases(workload), address); err != nil {
			return nil, err
		}
	}
	for index, text := range parsed.Services {
		service := &workloadapi.Service{}
		if err := protojson.Unmarshal(text, service); err != nil {
			return nil, fmt.Errorf("%s: services[%d]: %w", file, index, err)
		}
		address := &workloadapi.Address{Type: &workloadapi.Address_Service{Service: service}}
		if err := loaded[addressType].add(service.Namespace+"/"+service.Hostname, serviceAliases(service), address); err != nil {
			return nil, err
		}
	}
	for index, text := range parsed.Policies {
		policy := &security.Authorization{}
		if err := protojson.Unmarshal(text, policy); err != nil {
			return nil, fmt.Errorf("%s: policies[%d]: %w", file, index, err)
		}
		if err := loaded[authorizationType].add(policy.Namespace+"/"+policy.Name, nil, policy); err != nil {
			return nil, err
		}
	}
	for index, raw := range parsed.Raw {
		group, known := loaded[raw.Type]
		if !known {
			return nil, fmt.Errorf("%s: raw[%d]: type %q is not served", file, index, raw.Type)
		}
		group.addBytes(raw.Name, nil, raw.Type, raw.Value)
	}
	return loaded, nil
}

func (r resources) add(name string, aliases []string, message proto.Message) error {
	value, err := proto.MarshalOptions{Deterministic: true}.Marshal(message)
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	r.addBytes(name, aliases, "type.googleapis.com/"+string(message.ProtoReflect().Descriptor().FullName()), value)
	return nil
}

// addBytes versions a resource by its content, so that a version means the same in every run of the server.
func (r resources) addBytes(name string, aliases []string, typeURL string, value []byte) {
	hash := sha256.Sum256(value)
	r[name] = &discovery.Resource{
		Name:     name,
		Aliases:  aliases,
		Version:  hex.EncodeToString(hash[:8]),
		Resource: &anypb.Any{TypeUrl: typeURL, Value: value},
	}
}

// names in a fixed order, so that two runs send the same bytes.
func (r resources) names() []string {
	names := make([]string, 0, len(r))
	for name := range r {
		names = append(names, name)
	}
	sort.Strings(names)
	return names
}

func workloadAliases(workload *workloadapi.Workload) []string {
	var aliases []string
	for _, bytes := range workload.Addresses {
		if address, ok := netip.AddrFromSlice(bytes); ok {
			aliases = append(aliases, workload.Network+"/"+address.String())
		}
	}
	return aliases
}

func serviceAliases(service *workloadapi.Service) []string {
	var aliases []string
	for _, entry := range service.Addresses {
		if address, ok := netip.AddrFromSlice(entry.Address); ok && entry.Length == nil {
			aliases = append(aliases, entry.Network+"/"+address.String())
		}
	}
	return aliases
}
