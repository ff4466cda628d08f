package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/pem"
	"errors"
	"flag"
	"fmt"
	"os"
	"strings"
	"time"

	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/structpb"
	caapi "istio.io/api/security/v1alpha1"
)

// The tag of a URI inside a GeneralName: context-specific 6 (RFC 5280, section 4.2.1.6).
const generalNameURI = 6

func runCAClient(ctx context.Context, args []string) error {
	flags := flag.NewFlagSet("ca-client", flag.ContinueOnError)
	var target dialFlags
	target.register(flags)
	identity := flags.String("identity", "", "spiffe:// identity to ask for")
	impersonated := flags.String("impersonated", "", "identity named in the metadata, when it differs")
	ttl := flags.Duration("ttl", time.Hour, "lifetime to ask for")
	out := flags.String("out", "", "base name of the files that receive chain, key and root")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if err := required(flags, "address", "root-cert", "identity"); err != nil {
		return err
	}
	connection, err := target.dial()
	if err != nil {
		return err
	}
	defer connection.Close()

	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	csr, err := makeRequest(key, *identity)
	if err != nil {
		return err
	}
	if *impersonated == "" {
		impersonated = identity
	}
	metadata, err := structpb.NewStruct(map[string]any{"ImpersonatedIdentity": *impersonated})
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	request := &caapi.IstioCertificateRequest{Csr: csr, ValidityDuration: int64(ttl.Seconds()), Metadata: metadata}
	response, err := caapi.NewIstioCertificateServiceClient(connection).CreateCertificate(ctx, request)
	if err != nil {
		emit("refused", fields{"code": status.Code(err).String(), "message": status.Convert(err).Message()})
		return errors.New("the authority refused")
	}
	return reportChain(response.CertChain, key, *identity, *out)
}

func makeRequest(key *ecdsa.PrivateKey, identity string) (string, error) {
	names, err := asn1.Marshal([]asn1.RawValue{{Class: asn1.ClassContextSpecific, Tag: generalNameURI, Bytes: []byte(identity)}})
	if err != nil {
		return "", err
	}
	template := &x509.CertificateRequest{ExtraExtensions: []pkix.Extension{{Id: oidSAN, Critical: true, Value: names}}}
	der, err := x509.CreateCertificateRequest(rand.Reader, template, key)
	if err != nil {
		return "", err
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der})), nil
}

// reportChain checks what came back as a workload would: the leaf is for our key and identity, and the chain ends in the root
// that is its last element.
func reportChain(texts []string, key *ecdsa.PrivateKey, identity, out string) error {
	if len(texts) < 2 {
		return fmt.Errorf("a chain of %d elements has no root", len(texts))
	}
	var chain []*x509.Certificate
	for index, text := range texts {
		for rest := []byte(text); ; {
			var block *pem.Block
			if block, rest = pem.Decode(rest); block == nil {
				break
			}
			certificate, err := x509.ParseCertificate(block.Bytes)
			if err != nil {
				return fmt.Errorf("element %d: %w", index, err)
			}
			chain = append(chain, certificate)
		}
	}
	leaf := chain[0]
	if !key.PublicKey.Equal(leaf.PublicKey) {
		return errors.New("the leaf is not for the key of the request")
	}
	roots, intermediates := x509.NewCertPool(), x509.NewCertPool()
	roots.AppendCertsFromPEM([]byte(texts[len(texts)-1]))
	for _, text := range texts[1 : len(texts)-1] {
		intermediates.AppendCertsFromPEM([]byte(text))
	}
	usages := []x509.ExtKeyUsage{x509.ExtKeyUsageAny}
	if _, err := leaf.Verify(x509.VerifyOptions{Roots: roots, Intermediates: intermediates, KeyUsages: usages}); err != nil {
		return fmt.Errorf("the chain does not verify: %w", err)
	}
	if found := uris(leaf); len(found) != 1 || found[0] != identity {
		return fmt.Errorf("the leaf is for %v, asked for %s", found, identity)
	}
	emit("chain", fields{"elements": len(texts), "certificates": describeChain(chain)})
	if out == "" {
		return nil
	}
	keyPEM, err := encodeKey(key)
	if err != nil {
		return err
	}
	files := map[string]string{".pem": strings.Join(texts[:len(texts)-1], "\n"), "-key.pem": string(keyPEM), "-root.pem": texts[len(texts)-1]}
	for suffix, content := range files {
		if err := os.WriteFile(out+suffix, []byte(content), 0o600); err != nil {
			return err
		}
	}
	return nil
}
