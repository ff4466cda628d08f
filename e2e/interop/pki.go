package main

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"flag"
	"fmt"
	"math/big"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// authority is a root that signs leaves directly.
type authority struct {
	root    *x509.Certificate
	rootPEM []byte
	key     crypto.Signer
}

// list collects a flag that may be given several times.
type list []string

func (l *list) String() string { return strings.Join(*l, ",") }

func (l *list) Set(value string) error {
	*l = append(*l, value)
	return nil
}

// runInitCA writes root.pem, root-key.pem, server.pem and server-key.pem.
func runInitCA(_ context.Context, args []string) error {
	flags := flag.NewFlagSet("init-ca", flag.ContinueOnError)
	dir := flags.String("dir", "", "directory to write into; made if missing")
	trustDomain := flags.String("trust-domain", "cluster.local", "the root's own name")
	var names, addresses list
	flags.Var(&names, "dns", "DNS name of the server certificate (repeatable)")
	flags.Var(&addresses, "ip", "address of the server certificate (repeatable)")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if err := required(flags, "dir"); err != nil {
		return err
	}
	if err := os.MkdirAll(*dir, 0o700); err != nil {
		return err
	}
	ca, keyPEM, err := newAuthority(*trustDomain)
	if err != nil {
		return err
	}
	server := template(24 * time.Hour)
	server.DNSNames = append(names, "localhost")
	server.IPAddresses = []net.IP{net.IPv4(127, 0, 0, 1), net.IPv6loopback}
	for _, text := range addresses {
		address := net.ParseIP(text)
		if address == nil {
			return fmt.Errorf("--ip %q is not an address", text)
		}
		server.IPAddresses = append(server.IPAddresses, address)
	}
	serverPEM, serverKeyPEM, err := ca.issue(server)
	if err != nil {
		return err
	}
	files := map[string][]byte{"root.pem": ca.rootPEM, "root-key.pem": keyPEM, "server.pem": serverPEM, "server-key.pem": serverKeyPEM}
	for name, content := range files {
		if err := os.WriteFile(filepath.Join(*dir, name), content, 0o600); err != nil {
			return err
		}
	}
	emit("ca", fields{"dir": *dir})
	return nil
}

// runIssue writes NAME.pem (leaf, then root) and NAME-key.pem. The flags reach past what a sound authority would sign, so that
// refusals can be tested: several identities, none, an expired lifetime.
func runIssue(_ context.Context, args []string) error {
	flags := flag.NewFlagSet("issue", flag.ContinueOnError)
	dir := flags.String("dir", "", "directory of init-ca")
	name := flags.String("name", "", "base name of the files")
	start := flags.Duration("not-before", -time.Minute, "start of validity, from now")
	ttl := flags.Duration("ttl", time.Hour, "end of validity, from now")
	var identities, names list
	flags.Var(&identities, "identity", "spiffe:// URI (repeatable)")
	flags.Var(&names, "dns", "DNS name beside the identities (repeatable)")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if err := required(flags, "dir", "name"); err != nil {
		return err
	}
	ca, err := loadAuthority(filepath.Join(*dir, "root.pem"), filepath.Join(*dir, "root-key.pem"))
	if err != nil {
		return err
	}
	leaf := template(*ttl)
	leaf.NotBefore = time.Now().Add(*start)
	leaf.DNSNames = names
	for _, text := range identities {
		identity, err := url.Parse(text)
		if err != nil {
			return err
		}
		leaf.URIs = append(leaf.URIs, identity)
	}
	certPEM, keyPEM, err := ca.issue(leaf)
	if err != nil {
		return err
	}
	base := filepath.Join(*dir, *name)
	if err := os.WriteFile(base+".pem", append(certPEM, ca.rootPEM...), 0o600); err != nil {
		return err
	}
	if err := os.WriteFile(base+"-key.pem", keyPEM, 0o600); err != nil {
		return err
	}
	emit("issued", fields{"certificate": base + ".pem", "key": base + "-key.pem", "identities": identities})
	return nil
}

func newAuthority(trustDomain string) (*authority, []byte, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, err
	}
	root := template(24 * time.Hour)
	root.Subject = pkix.Name{Organization: []string{trustDomain}}
	root.IsCA = true
	root.BasicConstraintsValid = true
	root.KeyUsage = x509.KeyUsageCertSign | x509.KeyUsageCRLSign
	root.ExtKeyUsage = nil
	der, err := x509.CreateCertificate(rand.Reader, root, root, key.Public(), key)
	if err != nil {
		return nil, nil, err
	}
	parsed, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, nil, err
	}
	keyPEM, err := encodeKey(key)
	if err != nil {
		return nil, nil, err
	}
	return &authority{root: parsed, rootPEM: encodeCertificate(der), key: key}, keyPEM, nil
}

func loadAuthority(certFile, keyFile string) (*authority, error) {
	rootPEM, err := os.ReadFile(certFile)
	if err != nil {
		return nil, err
	}
	keyPEM, err := os.ReadFile(keyFile)
	if err != nil {
		return nil, err
	}
	certBlock, _ := pem.Decode(rootPEM)
	keyBlock, _ := pem.Decode(keyPEM)
	if certBlock == nil || keyBlock == nil {
		return nil, fmt.Errorf("%s or %s holds no PEM block", certFile, keyFile)
	}
	root, err := x509.ParseCertificate(certBlock.Bytes)
	if err != nil {
		return nil, err
	}
	key, err := x509.ParsePKCS8PrivateKey(keyBlock.Bytes)
	if err != nil {
		return nil, err
	}
	signer, ok := key.(crypto.Signer)
	if !ok {
		return nil, fmt.Errorf("%s cannot sign", keyFile)
	}
	return &authority{root: root, rootPEM: rootPEM, key: signer}, nil
}

// template is a leaf for both sides of TLS with an empty subject; its names are the caller's.
func template(ttl time.Duration) *x509.Certificate {
	now := time.Now()
	return &x509.Certificate{
		NotBefore:   now.Add(-time.Minute),
		NotAfter:    now.Add(ttl),
		KeyUsage:    x509.KeyUsageDigitalSignature | x509.KeyUsageKeyEncipherment,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
}

func (a *authority) issue(leaf *x509.Certificate) (certPEM, keyPEM []byte, err error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, err
	}
	certPEM, err = a.sign(leaf, key.Public())
	if err != nil {
		return nil, nil, err
	}
	keyPEM, err = encodeKey(key)
	return certPEM, keyPEM, err
}

func (a *authority) sign(leaf *x509.Certificate, public crypto.PublicKey) ([]byte, error) {
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120))
	if err != nil {
		return nil, err
	}
	leaf.SerialNumber = serial
	der, err := x509.CreateCertificate(rand.Reader, leaf, a.root, public, a.key)
	if err != nil {
		return nil, err
	}
	return encodeCertificate(der), nil
}

func encodeCertificate(der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
}

func encodeKey(key crypto.Signer) ([]byte, error) {
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, err
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), nil
}

func loadPool(file string) (*x509.CertPool, error) {
	text, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(text) {
		return nil, errors.New(file + " holds no certificate")
	}
	return pool, nil
}
