//! Jobs over https: a private root is trusted when it is named, and only then.

use std::io::{Read, Write};
use std::net::TcpListener;
use std::sync::Arc;

use crate::support::{PingSystem, Runner, binary};
use rcgen::{BasicConstraints, Certificate, CertificateParams, IsCa, Issuer, KeyPair};
use rustls::pki_types::PrivatePkcs8KeyDer;
use rustls::{ServerConfig, ServerConnection, StreamOwned};

/// What it lists, as an orchestrator.
const LIST: &str = r#"[{"address": "https://own-name", "runners": [{"url": "https://own-name/apps/a/app",
"mode": "single-shot", "capacity": 1, "capacity_used": 0}]}]"#;

/// A gateway that speaks https with a certificate for localhost, and its root in PEM form.
fn https_gateway() -> (String, String) {
    let root_key = KeyPair::generate().unwrap();
    let mut root = CertificateParams::new([]).unwrap();
    root.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let root_pem = root.self_signed(&root_key).unwrap().pem();
    let key = KeyPair::generate().unwrap();
    let certificate = CertificateParams::new(["localhost".to_owned()])
        .unwrap()
        .signed_by(&key, &Issuer::new(root, root_key))
        .unwrap();
    (serve(&certificate, &key), root_pem)
}

/// The same with a self-signed certificate that is marked as an authority, as openssl makes it, for this name.
fn self_signed_gateway(name: &str) -> (String, String) {
    let key = KeyPair::generate().unwrap();
    let mut certificate = CertificateParams::new([name.to_owned()]).unwrap();
    certificate.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let certificate = certificate.self_signed(&key).unwrap();
    (serve(&certificate, &key), certificate.pem())
}

fn serve(certificate: &Certificate, key: &KeyPair) -> String {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(
            vec![certificate.der().clone()],
            PrivatePkcs8KeyDer::from(key.serialize_der()).into(),
        )
        .unwrap();
    let config = Arc::new(config);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        for tcp in listener.incoming().map_while(Result::ok) {
            let connection = ServerConnection::new(Arc::clone(&config)).unwrap();
            std::thread::spawn(move || answer_one(StreamOwned::new(connection, tcp)));
        }
    });
    format!("https://localhost:{port}")
}

fn answer_one(mut stream: impl Read + Write) {
    let mut request = Vec::new();
    let mut piece = [0; 4096];
    let is_list = |request: &[u8]| request.starts_with(b"GET ") && request.ends_with(b"\r\n\r\n");
    while !request.ends_with(b"}") && !is_list(&request) {
        match stream.read(&mut piece) {
            Ok(read) if read > 0 => request.extend_from_slice(&piece[..read]),
            _ => return,
        }
    }
    let body = if is_list(&request) { LIST } else { "{}" };
    let head = "HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length";
    let answer = format!("{head}: {}\r\n\r\n{body}", body.len());
    let _ = stream.write_all(answer.as_bytes());
    let _ = stream.flush();
}

#[test]
fn a_private_root_is_trusted_when_it_is_named() {
    let pings = PingSystem::start(99.5);
    let (url, root) = https_gateway();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("root.pem");
    std::fs::write(&file, root).unwrap();
    let arguments = [
        "--rate",
        "6000",
        "--max-jobs",
        "3",
        "--ca-file",
        file.to_str().unwrap(),
    ];
    for (arguments, outcome) in [(&arguments[..], "success"), (&arguments[..4], "connect")] {
        let finished = Runner::start(&pings.url(), &url, arguments).finish();
        assert!(finished.status.success(), "{}", finished.stderr);
        for job in finished.of_kind("job") {
            assert_eq!(job["outcome"], outcome, "{job}");
            assert_eq!(
                job["error"]
                    .as_str()
                    .is_some_and(|e| e.contains("certificate")),
                outcome == "connect"
            );
        }
        assert_eq!(
            finished.summary()["capabilities"]["gpu-check"]["attempts"],
            3
        );
    }
}

#[test]
fn a_self_signed_certificate_is_compared_and_its_name_checked() {
    let pings = PingSystem::start(99.5);
    for (name, outcome) in [("localhost", "success"), ("elsewhere.example", "connect")] {
        let (url, pem) = self_signed_gateway(name);
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("own.pem");
        std::fs::write(&file, pem).unwrap();
        let arguments = ["--max-jobs", "1", "--ca-file", file.to_str().unwrap()];
        let finished = Runner::start(&pings.url(), &url, &arguments).finish();
        let job = finished.of_kind("job")[0];
        assert_eq!(job["outcome"], outcome, "{job}");
        let mut check = binary();
        check.args(["check", "--agent", "agent-001", "--ping-url", &pings.url()]);
        check.args(["--gateway-url", &url, "--timeout", "77s"]);
        let said = String::from_utf8(check.output().unwrap().stdout).unwrap();
        assert!(said.contains("its certificate is not trusted"), "{said}");
        check.arg("--ca-file").arg(&file);
        let said = String::from_utf8(check.output().unwrap().stdout).unwrap();
        let is_misnamed = said.contains("Name the gateway as its certificate does");
        assert_eq!(is_misnamed, name != "localhost", "{said}");
    }
}

/// Orchestrators show certificates that nobody vouches for.
#[test]
fn the_certificate_of_an_orchestrator_is_pinned_named_or_ignored() {
    let pings = PingSystem::start(99.5);
    let (url, pem) = self_signed_gateway("localhost");
    let folder = tempfile::tempdir().unwrap();
    let own = folder.path().join("own.pem");
    std::fs::write(&own, pem).unwrap();
    let file = folder.path().join("runner.toml");
    let configure = |more: &str| {
        let agent = format!("[[agents]]\nid = 'agent-001'\nrunner = '{url}/apps/a/app'\n{more}");
        std::fs::write(&file, agent).unwrap();
    };
    let config = ["--config", file.to_str().unwrap()];
    let check = |arguments: &[&str]| {
        let mut check = binary();
        check.args(["check", "--ping-url", &pings.url()]);
        let output = check.args(config).args(arguments).output().unwrap();
        (
            output.status.code(),
            String::from_utf8(output.stdout).unwrap(),
        )
    };
    let outcome = |arguments: &[&str]| {
        let arguments = [&config[..], &["--max-jobs", "1"], arguments].concat();
        let finished = Runner::start(&pings.url(), "http://127.0.0.1:9", &arguments).finish();
        finished.of_kind("job")[0]["outcome"].clone()
    };
    configure("");
    assert_eq!(outcome(&[]), "connect");
    let (code, said) = check(&[]);
    assert_eq!(code, Some(1), "{said}");
    let (_, fingerprint) = said
        .split_once("orchestrator_fingerprint = \"")
        .expect("how to pin it");
    let fingerprint = fingerprint.split('"').next().unwrap();
    assert_eq!(fingerprint.len(), "sha256:".len() + 64, "{said}");
    for trusted in [
        &["--insecure-orchestrators"][..],
        &["--ca-file", own.to_str().unwrap()],
    ] {
        assert_eq!(outcome(trusted), "success");
        let (code, said) = check(trusted);
        assert_eq!(code, Some(0), "{said}");
        assert!(said.contains(fingerprint), "{said}");
        assert!(
            said.contains("/apps/a/app: listed, 0 of 1 places in use"),
            "{said}"
        );
    }
    configure(&format!("orchestrator_fingerprint = '{fingerprint}'"));
    assert_eq!(outcome(&[]), "success");
    let (code, said) = check(&[]);
    assert_eq!(code, Some(0), "{said}");
    assert!(said.contains("is the one that is pinned"), "{said}");
    // Neither the file nor the option makes another certificate the pinned one.
    configure(&format!(
        "orchestrator_fingerprint = 'sha256:{}'",
        "ab".repeat(32)
    ));
    assert_eq!(outcome(&["--insecure-orchestrators"]), "connect");
    let (code, said) = check(&["--ca-file", own.to_str().unwrap()]);
    assert_eq!(code, Some(1), "{said}");
}
