package main

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
)

// meshClientTLS is what a peer of the mesh presents when it dials: TLS 1.3, ALPN h2, its own certificate, and a check of the
// server's chain and, when expected is not empty, of its only URI SAN. There is no host name to check.
func meshClientTLS(certFile, keyFile, rootFile, expected string) (*tls.Config, error) {
	certificate, err := tls.LoadX509KeyPair(certFile, keyFile)
	if err != nil {
		return nil, err
	}
	roots, err := loadPool(rootFile)
	if err != nil {
		return nil, err
	}
	return &tls.Config{
		MinVersion:         tls.VersionTLS13,
		NextProtos:         []string{"h2"},
		Certificates:       []tls.Certificate{certificate},
		InsecureSkipVerify: true, // replaced by VerifyConnection, which knows identities instead of host names
		VerifyConnection: func(state tls.ConnectionState) error {
			emit("tls", describeConnection(state))
			return verifyPeer(state, roots, x509.ExtKeyUsageServerAuth, expected)
		},
	}, nil
}

// meshServerTLS requires a client certificate with one URI SAN.
func meshServerTLS(certFile, keyFile, rootFile string) (*tls.Config, error) {
	certificate, err := tls.LoadX509KeyPair(certFile, keyFile)
	if err != nil {
		return nil, err
	}
	roots, err := loadPool(rootFile)
	if err != nil {
		return nil, err
	}
	return &tls.Config{
		MinVersion:   tls.VersionTLS13,
		NextProtos:   []string{"h2"},
		Certificates: []tls.Certificate{certificate},
		ClientAuth:   tls.RequireAndVerifyClientCert,
		ClientCAs:    roots,
		VerifyConnection: func(state tls.ConnectionState) error {
			emit("tls", describeConnection(state))
			return verifyPeer(state, roots, x509.ExtKeyUsageClientAuth, "")
		},
	}, nil
}

func verifyPeer(state tls.ConnectionState, roots *x509.CertPool, usage x509.ExtKeyUsage, expected string) error {
	if len(state.PeerCertificates) == 0 {
		return errors.New("the peer sent no certificate")
	}
	intermediates := x509.NewCertPool()
	for _, certificate := range state.PeerCertificates[1:] {
		intermediates.AddCert(certificate)
	}
	leaf := state.PeerCertificates[0]
	options := x509.VerifyOptions{Roots: roots, Intermediates: intermediates, KeyUsages: []x509.ExtKeyUsage{usage}}
	if _, err := leaf.Verify(options); err != nil {
		return err
	}
	identities := uris(leaf)
	if len(identities) != 1 {
		return fmt.Errorf("the peer has %d identities: %v", len(identities), identities)
	}
	if expected != "" && identities[0] != expected {
		return fmt.Errorf("the peer is %s, expected %s", identities[0], expected)
	}
	return nil
}

func describeConnection(state tls.ConnectionState) fields {
	described := fields{
		"version": tls.VersionName(state.Version),
		"cipher":  tls.CipherSuiteName(state.CipherSuite),
		"curve":   state.CurveID.String(),
		"alpn":    state.NegotiatedProtocol,
		"sni":     state.ServerName,
		"resumed": state.DidResume,
		"peer":    []string{},
	}
	if len(state.PeerCertificates) > 0 {
		described["peer"] = uris(state.PeerCertificates[0])
	}
	return described
}

func uris(certificate *x509.Certificate) []string {
	texts := make([]string, 0, len(certificate.URIs))
	for _, uri := range certificate.URIs {
		texts = append(texts, uri.String())
	}
	return texts
}

// describeChain gives the facts of each certificate that the mesh's rules speak about, leaf first.
func describeChain(chain []*x509.Certificate) []fields {
	described := make([]fields, 0, len(chain))
	for _, certificate := range chain {
		critical := slices.ContainsFunc(certificate.Extensions, isCriticalSAN)
		described = append(described, fields{
			"subject":        certificate.Subject.String(),
			"issuer":         certificate.Issuer.String(),
			"uris":           uris(certificate),
			"dns":            append([]string{}, certificate.DNSNames...),
			"sanCritical":    critical,
			"isCA":           certificate.IsCA,
			"notBefore":      certificate.NotBefore.Unix(),
			"notAfter":       certificate.NotAfter.Unix(),
			"serial":         certificate.SerialNumber.Text(16),
			"serverAuth":     slices.Contains(certificate.ExtKeyUsage, x509.ExtKeyUsageServerAuth),
			"clientAuth":     slices.Contains(certificate.ExtKeyUsage, x509.ExtKeyUsageClientAuth),
			"publicKey":      certificate.PublicKeyAlgorithm.String(),
			"signature":      certificate.SignatureAlgorithm.String(),
			"digitalSigning": certificate.KeyUsage&x509.KeyUsageDigitalSignature != 0,
		})
	}
	return described
}
