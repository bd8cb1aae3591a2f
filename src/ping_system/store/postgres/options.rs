//! The URL of a PostgreSQL database: hosts, and TLS as libpq understands it.

use std::fmt;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, ensure};
use tokio_postgres::Config;
use tokio_postgres::config::{Host, SslMode, TargetSessionAttrs};

use super::tls::{self, Tls, Verify};

/// The timeout of connecting to one server, including its first answers, where the URL sets none.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// After this time without an acknowledgement the connection is given up, where the URL sets none.
const TCP_USER_TIMEOUT: Duration = Duration::from_secs(10);

const EXPECTED: &str = "expected postgres://[USER[:PASSWORD]@]HOST[:PORT][,HOST[:PORT]…]/DATABASE, \
    with parameters as in libpq (sslmode, sslrootcert, connect_timeout, application_name, …)";

/// The servers of a database, in the order in which they are tried. It may hold a password, which is never shown.
#[derive(Clone)]
pub struct PostgresOptions {
    pub(super) servers: Vec<Server>,
}

/// One server.
#[derive(Clone)]
pub(super) struct Server {
    pub(super) config: Config,
    pub(super) tls: Tls,
}

impl fmt::Debug for PostgresOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names = self.servers.iter().map(Server::name);
        f.debug_list().entries(names).finish()
    }
}

impl PostgresOptions {
    /// Parses `postgres://…`; the password may be in `PGPASSWORD`. `sslmode`, `sslrootcert`, `sslcert` and `sslkey`
    /// mean what they mean to libpq, except that without `sslmode` a server beyond loopback must show a certificate
    /// that is valid for its name (`verify-full`). `ca_file` has the roots where `sslrootcert` names none; it does not
    /// change how strictly a server is verified. Only servers that can be written to are used.
    ///
    /// # Errors
    /// What is wrong, without any part of the URL, or a certificate file that cannot be read.
    pub fn parse(url: &str, ca_file: Option<&Path>) -> anyhow::Result<Self> {
        let (scheme, rest) = url.split_once("://").context(EXPECTED)?;
        ensure!(matches!(scheme, "postgres" | "postgresql"), EXPECTED);
        let (address, query) = rest.split_once('?').unwrap_or((rest, ""));
        let (parameters, mut tls) = TlsParameters::take_from(query)?;
        tls.files.default_roots = ca_file.map(Path::to_owned);
        let (authority, path) = address
            .split_once('/')
            .map_or((address, String::new()), |(authority, database)| {
                (authority, format!("/{database}"))
            });
        let (user, hosts) = authority
            .rsplit_once('@')
            .map_or((String::new(), authority), |(user, hosts)| {
                (format!("{user}@"), hosts)
            });
        let servers = hosts.split(',').map(|host| {
            let url = format!("postgres://{user}{host}{path}?{parameters}");
            Server::new(&url, &tls)
        });
        Ok(Self {
            servers: servers.collect::<anyhow::Result<_>>()?,
        })
    }
}

impl Server {
    fn new(url: &str, tls: &TlsParameters) -> anyhow::Result<Self> {
        // The error may show a part of the URL that belongs to the password.
        let mut config: Config = url.parse().ok().context(EXPECTED)?;
        ensure!(
            !config.get_hosts().is_empty() || !config.get_hostaddrs().is_empty(),
            EXPECTED
        );
        if config.get_password().is_none()
            && let Ok(password) = std::env::var("PGPASSWORD")
        {
            config.password(password);
        }
        if config.get_application_name().is_none() {
            config.application_name("uptime-runner");
        }
        if config.get_tcp_user_timeout().is_none() {
            config.tcp_user_timeout(TCP_USER_TIMEOUT);
        }
        config.target_session_attrs(TargetSessionAttrs::ReadWrite);
        let (mode, verify) = tls.for_server(Route::of(&config));
        config.ssl_mode(mode);
        let tls = match mode {
            SslMode::Disable => Tls::None,
            _ => tls::connector(verify, &tls.files)?,
        };
        Ok(Self { config, tls })
    }

    /// The longest wait for the server when connecting, including its first answers.
    pub(super) fn timeout(&self) -> Duration {
        let set = self.config.get_connect_timeout().copied();
        set.unwrap_or(CONNECT_TIMEOUT)
    }

    /// Host and port, or the folder of a socket.
    pub(super) fn name(&self) -> String {
        let port = self.config.get_ports().first().copied().unwrap_or(5432);
        let address = self.config.get_hostaddrs().first().map(IpAddr::to_string);
        match self.config.get_hosts().first() {
            Some(Host::Unix(path)) => path.display().to_string(),
            Some(Host::Tcp(host)) => format!("{host}:{port}"),
            None => format!("{}:{port}", address.unwrap_or_default()),
        }
    }
}

/// Which way connections to a server take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Route {
    /// A Unix socket, on which PostgreSQL speaks no TLS.
    Socket,
    Loopback,
    Network,
}

impl Route {
    fn of(config: &Config) -> Self {
        let is_loopback = |host: &Host| match host {
            Host::Unix(_) => true,
            Host::Tcp(name) => {
                name == "localhost" || name.parse().is_ok_and(|ip: IpAddr| ip.is_loopback())
            }
        };
        let is_socket = |host: &Host| matches!(host, Host::Unix(_));
        let (hosts, addresses) = (config.get_hosts(), config.get_hostaddrs());
        if addresses.is_empty() && hosts.iter().all(is_socket) {
            Self::Socket
        } else if addresses.iter().all(IpAddr::is_loopback)
            && (!addresses.is_empty() || hosts.iter().all(is_loopback))
        {
            Self::Loopback
        } else {
            Self::Network
        }
    }
}

/// The parameters that `tokio-postgres` does not know, or knows only in part.
struct TlsParameters {
    /// `sslmode`.
    mode: Option<String>,
    files: tls::Files,
}

impl TlsParameters {
    /// Separates them from the others.
    fn take_from(query: &str) -> anyhow::Result<(String, Self)> {
        let mut others = url::form_urlencoded::Serializer::new(String::new());
        let mut parameters = Self {
            mode: None,
            files: tls::Files::default(),
        };
        for (name, value) in url::form_urlencoded::parse(query.as_bytes()) {
            let path = || Some(PathBuf::from(value.as_ref()));
            match &*name {
                "sslmode" => parameters.mode = Some(value.into_owned()),
                "sslrootcert" => parameters.files.roots = path(),
                "sslcert" => parameters.files.certificate = path(),
                "sslkey" => parameters.files.key = path(),
                "target_session_attrs" => ensure!(
                    matches!(&*value, "any" | "read-write" | "primary"),
                    "target_session_attrs: expected read-write, since the ping system writes"
                ),
                _ => {
                    others.append_pair(&name, &value);
                }
            }
        }
        let known = [
            "disable",
            "allow",
            "prefer",
            "require",
            "verify-ca",
            "verify-full",
        ];
        if let Some(mode) = &parameters.mode {
            ensure!(
                known.contains(&mode.as_str()),
                "sslmode: expected one of {}",
                known.join(", ")
            );
            ensure!(
                !parameters.files.roots_of_the_system() || mode == "verify-full",
                "sslrootcert=system: expected sslmode=verify-full with it"
            );
        }
        Ok((others.finish().replace('+', "%20"), parameters))
    }

    /// Whether a server must speak TLS, and what its certificate must prove.
    fn for_server(&self, route: Route) -> (SslMode, Verify) {
        if route == Route::Socket {
            return (SslMode::Disable, Verify::Nothing);
        }
        match self.mode.as_deref() {
            Some("disable") => (SslMode::Disable, Verify::Nothing),
            Some("allow" | "prefer") => (SslMode::Prefer, Verify::Nothing),
            // With a root certificate libpq verifies, as it did before there was verify-ca.
            Some("require") if self.files.roots.is_none() => (SslMode::Require, Verify::Nothing),
            Some("require" | "verify-ca") => (SslMode::Require, Verify::Issuer),
            None if route == Route::Loopback && self.files.roots.is_none() => {
                (SslMode::Prefer, Verify::Nothing)
            }
            _ => (SslMode::Require, Verify::IssuerAndName),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn modes(url: &str) -> Vec<(SslMode, Verify)> {
        let query = url.split_once('?').map_or("", |(_, query)| query);
        let (_, tls) = TlsParameters::take_from(query).unwrap();
        let options = PostgresOptions::parse(url, None).unwrap();
        let servers = options.servers.iter();
        let modes = servers.map(|server| tls.for_server(Route::of(&server.config)));
        modes.collect()
    }

    #[test]
    fn each_host_is_a_server() {
        let url = "postgres://u:p%40,ss@db-1:6432,db-2/uptime?connect_timeout=5&application_name=a%20b&sslmode=require";
        let options = PostgresOptions::parse(url, None).unwrap();
        let names: Vec<String> = options.servers.iter().map(Server::name).collect();
        assert_eq!(names, ["db-1:6432", "db-2:5432"]);
        for server in &options.servers {
            assert_eq!(server.config.get_password().unwrap(), b"p@,ss");
            assert_eq!(server.config.get_dbname(), Some("uptime"));
            assert_eq!(server.config.get_application_name(), Some("a b"));
            let timeout = server.config.get_connect_timeout();
            assert_eq!(timeout, Some(&Duration::from_secs(5)));
        }
        assert!(!format!("{options:?}").contains("ss@"));
    }

    /// Where to look for the issuer is one question, whether to ask for it another.
    #[test]
    fn a_ca_file_changes_no_mode() {
        let root = rcgen::generate_simple_self_signed(["db".to_owned()]).unwrap();
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), root.cert.pem()).unwrap();
        for url in [
            "postgres://u@localhost/d",
            "postgres://u@db/d",
            "postgres://u@db/d?sslmode=require",
        ] {
            let mode_with = |ca_file| {
                let options = PostgresOptions::parse(url, ca_file).unwrap();
                options.servers[0].config.get_ssl_mode()
            };
            assert_eq!(mode_with(Some(file.path())), mode_with(None), "{url}");
        }
        let url = "postgres://u@db/d";
        let error = PostgresOptions::parse(url, Some(Path::new("/missing"))).unwrap_err();
        assert!(format!("{error:#}").contains("--ca-file /missing"));
    }

    #[test]
    fn tls_is_verified_beyond_loopback_unless_the_url_says_otherwise() {
        let nothing = |mode| (mode, Verify::Nothing);
        let full = (SslMode::Require, Verify::IssuerAndName);
        for (url, expected) in [
            ("postgres://u@localhost/d", nothing(SslMode::Prefer)),
            ("postgres://u@127.0.0.9/d", nothing(SslMode::Prefer)),
            ("postgres://u@[::1]:1/d", nothing(SslMode::Prefer)),
            (
                "postgres:///d?host=/run/postgresql",
                nothing(SslMode::Disable),
            ),
            ("postgres://u@10.0.0.1/d", full),
            ("postgres://u@db.example/d", full),
            (
                "postgres://u@db/d?sslmode=disable",
                nothing(SslMode::Disable),
            ),
            ("postgres://u@db/d?sslmode=allow", nothing(SslMode::Prefer)),
            ("postgres://u@db/d?sslmode=prefer", nothing(SslMode::Prefer)),
            (
                "postgres://u@db/d?sslmode=require",
                nothing(SslMode::Require),
            ),
            (
                "postgres://u@db/d?sslmode=verify-ca",
                (SslMode::Require, Verify::Issuer),
            ),
            ("postgres://u@localhost/d?sslmode=verify-full", full),
            ("postgres://u@db/d?sslrootcert=system", full),
        ] {
            assert_eq!(modes(url), [expected], "{url}");
        }
        let mixed = modes("postgres://u@localhost,db/d");
        assert_eq!(mixed, [nothing(SslMode::Prefer), full]);
    }

    #[test]
    fn what_is_wrong_is_refused_without_showing_the_url() {
        for url in [
            "postgres://",
            "postgres:///d",
            "mysql://u:secret@h/d",
            "postgres://u:secret@h:port/d",
            "postgres://u:secret@h/d?no_such_parameter=1",
            "postgres://u:secret@h/d?sslmode=sometimes",
            "postgres://u:secret@h/d?sslmode=require&sslrootcert=system",
            "postgres://u:secret@h/d?sslrootcert=/no/such/file",
            "postgres://u:secret@h/d?target_session_attrs=read-only",
            "postgres://u:sec?ret@h/d",
        ] {
            let error = PostgresOptions::parse(url, None).unwrap_err();
            let error = format!("{error:#}");
            assert!(!error.contains("sec"), "{error}");
        }
    }
}
