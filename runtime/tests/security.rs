//! Encrypted and authenticated connections, against real servers that insist on them.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;
#[path = "common/replay.rs"]
mod replaying;

use std::{
    fs,
    path::{Path, PathBuf},
};

use common::{LIMIT, config};
use meander_config::{
    CaptureConfig, ClientCertificate, Durability, GrpcReceiver, KafkaSasl, KafkaSink, KafkaTls, PostgresSource,
    RedisStreams, ReplayConfig, ReplayTarget, ResourceIdentity, SaslMechanism, SslMode, TopicManagement,
};
use meander_runtime::{
    kafka_client::require_admission,
    sink::topics::{Remarks, Topics},
    source::postgres::{
        preflight::{self, Credentials, wire_failure},
        wire::ReplicationConnection,
    },
};
use meander_test_support::{
    Authority, Identity, Kafka, Postgres, Redis, Runtime, eventually, free_address, read_topics,
};
use rdkafka::ClientConfig;

async fn execute(postgres: &Postgres, sql: &str) {
    postgres.client().await.batch_execute(sql).await.unwrap();
}

/// Waits until a topic holds so many records, and says how many it then holds.
async fn wait_for_records(client: &ClientConfig, topic: &str, count: usize) -> usize {
    eventually("the records are in Kafka", LIMIT, async || {
        let found = tokio::task::block_in_place(|| count_records(client, topic));
        if found >= count { Ok(found) } else { Err(found) }
    })
    .await
}

fn count_records(client: &ClientConfig, topic: &str) -> usize {
    let mut records = 0;
    read_topics(client, |name| name == topic, |_| records += 1);
    records
}

/// Waits until a session has ended for this reason.
async fn wait_for_failure(runtime: &Runtime, reason: &str) {
    let wanted = format!("meander_capture_failures_total{{reason=\"{reason}\"}}");
    eventually(&wanted, LIMIT, async || {
        let (_, metrics) = runtime.get("/metrics").await.map_err(|error| error.to_string())?;
        if metrics.contains(&wanted) {
            Ok(())
        } else {
            Err(metrics)
        }
    })
    .await;
}

/// A server with TLS. The superuser, who sets things up, comes as always; the role `meander` is let in by `hostssl` lines only.
struct TlsPostgres {
    server: Postgres,
    authority: Authority,
    certificate: Identity,
    folder: tempfile::TempDir,
}

impl TlsPostgres {
    /// `options` follow the method in the lines for `meander`.
    async fn start(hosts: &[&str], options: &str) -> Self {
        let authority = Authority::new();
        let certificate = authority.server(hosts);
        let folder = tempfile::tempdir().unwrap();
        let hba = folder.path().join("pg_hba.conf");
        fs::write(
            &hba,
            format!(
                "host all postgres 127.0.0.1/32 scram-sha-256
                 hostssl all meander 127.0.0.1/32 scram-sha-256 {options}
                 hostssl all by_md5 127.0.0.1/32 md5
                 hostssl all by_password 127.0.0.1/32 password
                 hostssl all by_trust 127.0.0.1/32 trust\n"
            ),
        )
        .unwrap();
        for path in [folder.path(), hba.as_path(), &certificate.key_file] {
            give_to_postgres(path);
        }
        let text = |path: &Path| path.display().to_string();
        let server = Postgres::start(&[
            ("ssl", "on"),
            ("ssl_cert_file", &text(&certificate.certificate_file)),
            ("ssl_key_file", &text(&certificate.key_file)),
            ("ssl_ca_file", &text(&authority.file())),
            ("hba_file", &text(&hba)),
        ])
        .await;
        execute(
            &server,
            "CREATE ROLE meander LOGIN REPLICATION PASSWORD 'one'; GRANT CREATE ON DATABASE postgres TO meander;
             CREATE TABLE t (id int PRIMARY KEY); ALTER TABLE t OWNER TO meander",
        )
        .await;
        fs::write(folder.path().join("username"), "meander").unwrap();
        fs::write(folder.path().join("password"), "one").unwrap();
        Self {
            server,
            authority,
            certificate,
            folder,
        }
    }

    /// Connects as `meander`, to the host, with the mode, trusting the authority.
    fn aim(&self, source: &mut PostgresSource, host: &str, mode: SslMode, authority: Option<PathBuf>) {
        source.host = host.to_owned();
        source.ssl_mode = mode;
        source.ca_file = authority;
        source.username_file = self.folder.path().join("username");
        source.password_file = self.folder.path().join("password");
    }
}

/// PostgreSQL takes a key only from a file that nobody else can read, and runs as another user when the tests run as root.
fn give_to_postgres(path: &Path) {
    if fs::metadata("/proc/self")
        .map(|metadata| std::os::unix::fs::MetadataExt::uid(&metadata))
        .unwrap()
        == 0
    {
        let done = std::process::Command::new("chown")
            .arg("postgres")
            .arg(path)
            .status()
            .unwrap();
        assert!(done.success());
    }
    let mode = if path.is_dir() { 0o755 } else { 0o600 };
    fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(mode)).unwrap();
}

/// How both kinds of connection end: nothing, or the reason and the sentence.
async fn try_both(source: &PostgresSource) -> Result<(), (&'static str, String)> {
    let credentials = Credentials::read(&source.server()).unwrap();
    let sql = preflight::connect(&source.server(), &credentials).await.map(drop);
    let replication = ReplicationConnection::connect(source, &credentials)
        .await
        .map(drop)
        .map_err(|error| wire_failure(source, &credentials.user, error));
    let told = |result: Result<(), preflight::SourceError>| result.map_err(|error| (error.reason(), error.to_string()));
    let (sql, replication) = (told(sql), told(replication));
    assert_eq!(sql, replication, "both connections are protected alike");
    sql
}

#[tokio::test(flavor = "multi_thread")]
async fn postgresql_has_to_prove_what_ssl_mode_asks_and_each_failure_says_what_to_do() {
    let (postgres, kafka) = (TlsPostgres::start(&["localhost"], "").await, Kafka::shared().await);
    let stranger = Authority::new();
    let (ours, theirs) = (Some(postgres.authority.file()), Some(stranger.file()));
    let mut source = config(&postgres.server, kafka, None).source;
    let refused = |outcome: Result<(), (&'static str, String)>, reason: &str, words: &str| {
        let (found, sentence) = outcome.unwrap_err();
        assert_eq!(found, reason, "{sentence}");
        assert!(sentence.contains(words), "{sentence}");
    };

    postgres.aim(&mut source, "127.0.0.1", SslMode::Disable, None);
    refused(
        try_both(&source).await,
        "ConnectionNotAdmitted",
        "set sslMode to Require",
    );
    // Anybody's certificate will do here; the password is bound to the session all the same.
    postgres.aim(&mut source, "127.0.0.1", SslMode::Require, None);
    try_both(&source).await.unwrap();
    // So who does not know it is no server of ours: neither one that asks for it in another way, nor one that asks for nothing.
    execute(
        &postgres.server,
        "SET password_encryption = 'md5'; CREATE ROLE by_md5 LOGIN REPLICATION PASSWORD 'one'; RESET password_encryption;
         CREATE ROLE by_password LOGIN REPLICATION PASSWORD 'one'; CREATE ROLE by_trust LOGIN REPLICATION",
    )
    .await;
    let username = source.username_file.clone();
    for role in ["by_md5", "by_password", "by_trust"] {
        fs::write(&username, role).unwrap();
        refused(try_both(&source).await, "ServerNotProven", "set sslMode to VerifyFull");
    }
    // One whose certificate is known may do so.
    postgres.aim(&mut source, "127.0.0.1", SslMode::VerifyCa, ours.clone());
    for role in ["by_md5", "by_trust"] {
        fs::write(&username, role).unwrap();
        try_both(&source).await.unwrap();
    }
    fs::write(&username, "meander").unwrap();
    postgres.aim(&mut source, "127.0.0.1", SslMode::VerifyCa, ours.clone());
    try_both(&source).await.unwrap();
    postgres.aim(&mut source, "localhost", SslMode::VerifyFull, ours.clone());
    try_both(&source).await.unwrap();

    postgres.aim(&mut source, "127.0.0.1", SslMode::VerifyFull, ours.clone());
    refused(
        try_both(&source).await,
        "CertificateRefused",
        "does not hold \"127.0.0.1\"",
    );
    postgres.aim(&mut source, "localhost", SslMode::VerifyCa, theirs);
    refused(
        try_both(&source).await,
        "CertificateRefused",
        "does not come from an authority in caSecretRef",
    );
    // Nor from one of Mozilla's list, which is trusted where no authority is named.
    postgres.aim(&mut source, "localhost", SslMode::VerifyFull, None);
    refused(
        try_both(&source).await,
        "CertificateRefused",
        "does not come from an authority",
    );
    postgres.aim(
        &mut source,
        "localhost",
        SslMode::VerifyCa,
        Some(postgres.folder.path().join("password")),
    );
    refused(
        try_both(&source).await,
        "CertificateUnreadable",
        "does not hold certificates",
    );

    postgres
        .certificate
        .replace_by(&postgres.authority.expired_server(&["localhost"]));
    execute(&postgres.server, "SELECT pg_reload_conf()").await;
    postgres.aim(&mut source, "localhost", SslMode::VerifyFull, ours);
    let expired = eventually(
        "the server shows its new certificate",
        LIMIT,
        async || match try_both(&source).await {
            Err(told) => Ok(told),
            Ok(()) => Err("the old one"),
        },
    )
    .await;
    refused(Err(expired), "CertificateRefused", "has expired");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_without_tls_is_refused_unless_plain_text_is_asked_for() {
    let (postgres, kafka) = (Postgres::start(&[]).await, Kafka::shared().await);
    let mut source = config(&postgres, kafka, None).source;
    try_both(&source).await.unwrap();
    source.ssl_mode = SslMode::Require;
    let (reason, sentence) = try_both(&source).await.unwrap_err();
    assert_eq!(reason, "TlsNotOffered", "{sentence}");
}

/// What docs/security.md grants in Redis.
const REDIS_COMMANDS: &[&str] = &[
    "info",
    "evalsha",
    "script|load",
    "exists",
    "hdel",
    "hget",
    "hgetall",
    "hmget",
    "hset",
    "xadd",
    "xinfo|stream",
    // For `durability: Aof` before Redis 7.2.
    "config|get",
];
/// What it grants a replay.
const REDIS_COMMANDS_OF_REPLAYS: &[&str] = &[
    "info",
    "evalsha",
    "script|load",
    "exists",
    "hget",
    "hincrby",
    "hmget",
    "hset",
    "xadd",
    "xinfo|stream",
];
const ACLS: &str = "org.apache.kafka.tools.AclCommand";
const TOPICS: &str = "org.apache.kafka.tools.TopicCommand";
const CONFIGS: &str = "kafka.admin.ConfigCommand";

/// What docs/security.md grants a pipeline with the topic prefix, and topics of its own.
async fn grant(kafka: &Kafka, config: &CaptureConfig) {
    let (namespace, name) = (&config.pipeline.namespace, &config.pipeline.name);
    let (prefix, slot) = (&config.kafka.topic_prefix, &config.source.slot_name);
    let rights = "--operation Create --operation Read --operation Write --operation DescribeConfigs";
    for what in [
        format!("{rights} --topic {prefix}. --resource-pattern-type prefixed"),
        format!("{rights} --topic __meander.{namespace}.{name}. --resource-pattern-type prefixed"),
        format!("{rights} --topic __meander.claims"),
        format!("--operation Write --operation Describe --transactional-id {namespace}/{name}/{slot}"),
        "--operation Describe --group meander- --resource-pattern-type prefixed".to_owned(),
    ] {
        kafka
            .tool(ACLS, &format!("--add --allow-principal User:meander {what}"))
            .await;
    }
}

/// Points the capture at the secure listener, as `meander` with the password in the file.
fn sign_in(config: &mut CaptureConfig, kafka: &Kafka, authority: &Authority, folder: &Path, mechanism: SaslMechanism) {
    fs::write(folder.join("username"), "meander\n").unwrap();
    fs::write(folder.join("password"), "one\n").unwrap();
    config.kafka.bootstrap_servers = vec![kafka.secure_bootstrap()];
    config.kafka.tls = Some(KafkaTls {
        ca_file: Some(authority.file()),
        client_certificate: None,
    });
    config.kafka.sasl = Some(KafkaSasl {
        mechanism,
        username_file: folder.join("username"),
        password_file: folder.join("password"),
    });
}

#[tokio::test(flavor = "multi_thread")]
async fn kafka_is_used_over_tls_and_sasl_with_no_more_than_the_grants_of_the_docs() {
    let authority = Authority::new();
    let kafka = Kafka::start_secure(&authority.server(&["localhost"])).await;
    let postgres = Postgres::start(&[]).await;
    execute(&postgres, "CREATE TABLE t (id int PRIMARY KEY)").await;
    let folder = tempfile::tempdir().unwrap();
    let mut config = config(&postgres, &kafka, None);
    let topic = format!("{}.public.t", config.kafka.topic_prefix);
    sign_in(
        &mut config,
        &kafka,
        &authority,
        folder.path(),
        SaslMechanism::ScramSha512,
    );

    // Each of these is its own reason, and at once.
    let admission = |config: &CaptureConfig| {
        let cluster = config.kafka.cluster();
        tokio::task::block_in_place(|| require_admission(&cluster, "t"))
    };
    let reason = |config: &CaptureConfig| admission(config).map_err(|error| error.reason());
    assert_eq!(reason(&config), Ok(()));
    let stranger = Authority::new();
    let mut other = config.clone();
    other.kafka.tls = Some(KafkaTls {
        ca_file: Some(stranger.file()),
        client_certificate: None,
    });
    assert_eq!(reason(&other), Err("KafkaTlsFailed"));
    other.kafka.tls = Some(KafkaTls::default());
    assert_eq!(reason(&other), Err("KafkaTlsFailed"));
    let mut plain = config.clone();
    sign_in(&mut plain, &kafka, &authority, folder.path(), SaslMechanism::Plain);
    assert_eq!(reason(&plain), Ok(()));
    plain.kafka.bootstrap_servers = vec![kafka.bootstrap().replace("127.0.0.1", "localhost")];
    // A server that hangs up need not mean this, so it is no more than a guess, which the client makes where the server closes in order. One that
    // resets the connection has only hung up.
    let hung_up = admission(&plain).unwrap_err().to_string();
    assert!(
        [
            "connecting to a PLAINTEXT broker listener?",
            "SSL connection closed by peer"
        ]
        .iter()
        .any(|said| hung_up.contains(said)),
        "{hung_up}"
    );
    let mut nobody = config.clone();
    nobody.kafka.sasl = None;
    assert!(reason(&nobody).is_err());

    fs::write(folder.path().join("password"), "wrong").unwrap();
    let mut runtime = Runtime::capture(&config);
    wait_for_failure(&runtime, "KafkaAuthenticationFailed").await;
    // What the Secret holds is read again.
    fs::write(folder.path().join("password"), "one").unwrap();
    wait_for_failure(&runtime, "KafkaNotAuthorized").await;
    grant(&kafka, &config).await;
    runtime.ready(LIMIT).await;
    execute(&postgres, "INSERT INTO t SELECT generate_series(1, 1000)").await;
    assert_eq!(wait_for_records(&kafka.client_config(), &topic, 1000).await, 1000);

    // The replay reads with the same settings, and needs no more, but for a place of its own.
    let receiver = free_address();
    tokio::spawn(meander_workload::receive::serve(receiver, None));
    let target = ReplayTarget::GrpcCall(GrpcReceiver::plain(format!("http://{receiver}")));
    let mut replay = Runtime::replay(&replay_of(&config, &config.pipeline.name, target));
    let refused = replay.process().wait(LIMIT);
    let said = replay.process().log_tail();
    assert_eq!(
        refused.code(),
        Some(i32::from(meander_config::EXIT_PERMANENT)),
        "{said}"
    );
    let right = "--operation Read --group meander-replay. --resource-pattern-type prefixed";
    assert!(said.contains(right), "{said}");
    kafka
        .tool(ACLS, &format!("--add --allow-principal User:meander {right}"))
        .await;
    replay.start_again();
    assert!(
        replay.process().wait(LIMIT).success(),
        "{}",
        replay.process().log_tail()
    );
    let log = fs::read_to_string(runtime.process().log()).unwrap();
    assert!(!log.contains("wrong"), "{log}");

    // Into topics of its own it writes with the same settings too.
    let namespace = &config.pipeline.namespace;
    let rights = "--operation Create --operation Write --operation DescribeConfigs";
    for what in [
        format!("{rights} --topic copy. --resource-pattern-type prefixed"),
        format!("{rights} --operation Read --topic __meander.{namespace}.copied.replay"),
        format!(
            "--operation Write --operation Describe --transactional-id meander-replay.{namespace}.copied. --resource-pattern-type prefixed"
        ),
    ] {
        kafka
            .tool(ACLS, &format!("--add --allow-principal User:meander {what}"))
            .await;
    }
    let copy = KafkaSink {
        topic_prefix: "copy".to_owned(),
        ..config.kafka.clone()
    };
    let mut replay = Runtime::replay(&replay_of(&config, "copied", ReplayTarget::Kafka(copy)));
    assert!(
        replay.process().wait(LIMIT).success(),
        "{}",
        replay.process().log_tail()
    );
    let count = |topic: &str| tokio::task::block_in_place(|| count_records(&kafka.client_config(), topic));
    assert_eq!(count("copy.public.t"), count(&topic));
}

/// A replay of everything that the pipeline has published, under a name that the grants know.
fn replay_of(config: &CaptureConfig, name: &str, target: ReplayTarget) -> ReplayConfig {
    let everything = replaying::everything(config, target);
    ReplayConfig {
        job: ResourceIdentity {
            namespace: config.pipeline.namespace.clone(),
            name: name.to_owned(),
            ..everything.job
        },
        ..everything
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_idle_pipeline_notices_that_kafka_is_gone_and_heals() {
    let (postgres, mut kafka) = (Postgres::start(&[]).await, Kafka::start().await);
    execute(&postgres, "CREATE TABLE t (id int PRIMARY KEY)").await;
    let config = config(&postgres, &kafka, None);
    let mut runtime = Runtime::capture(&config);
    runtime.ready(LIMIT).await;
    kafka.kill9();
    wait_for_failure(&runtime, "KafkaUnreachable").await;
    kafka.start_again().await;
    runtime.ready(LIMIT).await;
    execute(&postgres, "INSERT INTO t VALUES (1)").await;
    let topic = format!("{}.public.t", config.kafka.topic_prefix);
    wait_for_records(&kafka.client_config(), &topic, 1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn topics_of_somebody_else_are_checked_and_those_that_are_made_are_as_asked() {
    let (postgres, kafka) = (Postgres::start(&[]).await, Kafka::shared().await);
    execute(&postgres, "CREATE TABLE t (id int PRIMARY KEY)").await;
    let mut config = config(&postgres, kafka, None);
    let topic = format!("{}.public.t", config.kafka.topic_prefix);
    config.kafka.topic_config = [("retention.ms".to_owned(), "1234567890".to_owned())].into();
    config.kafka.topic_management = TopicManagement::External;
    let outcome = async |kafka: &KafkaSink, topic: &str| {
        let mut topics = Topics::new(kafka).unwrap();
        topics
            .ensure_data(topic, "public.t")
            .await
            .map_err(|error| error.to_string())
    };
    // What it says to run is what makes it go on.
    let missing = outcome(&config.kafka, &topic).await.unwrap_err();
    let command = missing.split_once("kafka-topics.sh").unwrap().1.to_owned();
    let arguments = command.split_once("--create").unwrap().1;
    kafka.tool(TOPICS, &format!("--create {arguments}")).await;
    outcome(&config.kafka, &topic).await.unwrap();
    config.kafka.topic_config = [("retention.ms".to_owned(), "5".to_owned())].into();
    let other = outcome(&config.kafka, &topic).await.unwrap_err();
    assert!(other.contains("--add-config retention.ms=5"), "{other}");
    // One that this pipeline would have made keeps its setting, and that is said.
    config.kafka.topic_management = TopicManagement::Managed;
    let remarks = Remarks::default();
    let mut topics = Topics::new(&config.kafka).unwrap().with_remarks(remarks.clone());
    topics.ensure_data(&topic, "public.t").await.unwrap();
    let (reason, remark) = remarks.first().unwrap();
    assert_eq!(reason, "TopicConfigDiffers");
    let command = remark.split_once("kafka-configs.sh").unwrap().1.to_owned();
    let setting = command.split_once("--alter").unwrap().1;
    topics.look_again().await.unwrap();
    assert!(remarks.first().is_some(), "nobody has mended it");
    kafka.tool(CONFIGS, &format!("--alter {setting}")).await;
    eventually("what is mended is said no more", LIMIT, async || {
        topics.look_again().await.unwrap();
        remarks.first().map_or(Ok(()), |(_, remark)| Err(remark))
    })
    .await;
    config.kafka.topic_management = TopicManagement::External;
    config.kafka.partitions = 4;
    let missing = ["a", "b"].map(|name| (format!("{topic}_{name}"), name.to_owned()));
    let all = Topics::new(&config.kafka).unwrap().ensure_all(missing.clone()).await;
    let all = all.unwrap_err().to_string();
    assert!(
        missing
            .iter()
            .all(|(topic, _)| all.contains(&format!("--topic {topic} "))),
        "{all}"
    );
    let count = outcome(&config.kafka, &topic).await.unwrap_err();
    assert!(count.contains("has 3 partitions and not 4"), "{count}");

    config.kafka.topic_management = TopicManagement::Managed;
    let made = format!("{topic}_made");
    outcome(&config.kafka, &made).await.unwrap();
    // As External it would be refused if it were not as asked.
    config.kafka.topic_management = TopicManagement::External;
    eventually("every broker knows the topic", LIMIT, async || {
        outcome(&config.kafka, &made).await
    })
    .await;
    let compacted = format!("{topic}_compacted");
    kafka
        .tool(
            TOPICS,
            &format!("--create --topic {compacted} --partitions 4 --config cleanup.policy=compact"),
        )
        .await;
    let refused = outcome(&config.kafka, &compacted).await.unwrap_err();
    assert!(refused.contains("--add-config cleanup.policy=delete"), "{refused}");
}

#[tokio::test(flavor = "multi_thread")]
async fn redis_is_used_over_tls_with_no_more_than_the_commands_of_the_docs() {
    let authority = Authority::new();
    let redis = Redis::start_secure(&authority.server(&["localhost"])).await;
    let (postgres, kafka) = (Postgres::start(&[]).await, Kafka::shared().await);
    execute(&postgres, "CREATE TABLE t (id int PRIMARY KEY)").await;
    let folder = tempfile::tempdir().unwrap();
    let mut config = config(&postgres, kafka, Some(&redis));
    let sink = config.redis.as_mut().unwrap();
    sink.durability = Durability::Aof;
    let stream = format!("{}.public.t", sink.stream_prefix);
    sink.url_file = folder.path().join("url");
    sink.ca_file = Some(authority.file());
    // To trim takes no other right.
    sink.max_length = Some(1_000_000);
    let url = |password: &str| format!("rediss://meander:{password}@localhost:{}/0", redis.tls_port());
    fs::write(&sink.url_file, url("wrong")).unwrap();
    let mut connection = redis.connection().await;
    let mut user = redis::cmd("ACL");
    user.arg("SETUSER").arg("meander").arg("on").arg(">one");
    user.arg(format!("~{}.*", sink.stream_prefix));
    for command in REDIS_COMMANDS {
        user.arg(format!("+{command}"));
    }
    let () = user.query_async(&mut connection).await.unwrap();
    for (name, value) in [("appendonly", "yes"), ("appendfsync", "always")] {
        let mut set = redis::cmd("CONFIG");
        let () = set
            .arg("SET")
            .arg(name)
            .arg(value)
            .query_async(&mut connection)
            .await
            .unwrap();
    }

    let mut runtime = Runtime::capture(&config);
    runtime.ready(LIMIT).await;
    execute(&postgres, "INSERT INTO t SELECT generate_series(1, 100)").await;
    wait_for_records(
        &kafka.client_config(),
        &format!("{}.public.t", config.kafka.topic_prefix),
        100,
    )
    .await;
    // A password that comes later is picked up, and Redis catches up from Kafka.
    fs::write(&config.redis.as_ref().unwrap().url_file, url("one")).unwrap();
    eventually("Redis has everything", LIMIT, async || {
        let length: i64 = redis::cmd("XLEN")
            .arg(&stream)
            .query_async(&mut connection)
            .await
            .unwrap();
        if length == 100 { Ok(()) } else { Err(length) }
    })
    .await;
    let log = fs::read_to_string(runtime.process().log()).unwrap();
    assert!(!log.contains("wrong"), "{log}");

    // A replay into streams of its own, as a user of its own.
    let mut user = redis::cmd("ACL");
    user.arg("SETUSER").arg("replayer").arg("on").arg(">two").arg("~copy.*");
    for command in REDIS_COMMANDS_OF_REPLAYS {
        user.arg(format!("+{command}"));
    }
    let () = user.query_async(&mut connection).await.unwrap();
    let url_file = folder.path().join("replay-url");
    fs::write(
        &url_file,
        format!("rediss://replayer:two@localhost:{}/0", redis.tls_port()),
    )
    .unwrap();
    let copy = RedisStreams {
        url_file,
        ca_file: Some(authority.file()),
        stream_prefix: "copy".to_owned(),
    };
    let mut replay = Runtime::replay(&replay_of(&config, "copied", ReplayTarget::Redis(copy)));
    assert!(
        replay.process().wait(LIMIT).success(),
        "{}",
        replay.process().log_tail()
    );
    let copied: i64 = (redis::cmd("XLEN").arg("copy.public.t").query_async(&mut connection))
        .await
        .unwrap();
    assert_eq!(copied, 100);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_capture_over_tls_shows_its_certificate_and_survives_a_new_password() {
    let postgres = TlsPostgres::start(&["localhost"], "clientcert=verify-full").await;
    let kafka = Kafka::shared().await;
    let mut config = config(&postgres.server, kafka, None);
    let authority = Some(postgres.authority.file());
    postgres.aim(&mut config.source, "localhost", SslMode::VerifyFull, authority);
    let (reason, sentence) = try_both(&config.source).await.unwrap_err();
    assert_eq!(reason, "AuthenticationFailed", "{sentence}");
    assert!(sentence.contains("client certificate"), "{sentence}");

    let client = postgres.authority.client("meander");
    config.source.client_certificate = Some(ClientCertificate {
        certificate_file: client.certificate_file,
        key_file: client.key_file,
    });
    let topic = format!("{}.public.t", config.kafka.topic_prefix);
    let mut runtime = Runtime::capture(&config);
    runtime.ready(LIMIT).await;
    execute(&postgres.server, "INSERT INTO t SELECT generate_series(1, 20000)").await;
    wait_for_records(&kafka.client_config(), &topic, 20_000).await;
    let plain: i64 = postgres
        .server
        .client()
        .await
        .query_one(
            "SELECT count(*) FROM pg_stat_ssl JOIN pg_stat_activity USING (pid) WHERE usename = 'meander' AND NOT ssl",
            &[],
        )
        .await
        .unwrap()
        .get(0);
    assert_eq!(plain, 0);

    // A new password does not end a session that runs; the next one needs it, and takes it once the file has it.
    execute(
        &postgres.server,
        "ALTER ROLE meander PASSWORD 'two'; INSERT INTO t VALUES (0)",
    )
    .await;
    wait_for_records(&kafka.client_config(), &topic, 20_001).await;
    execute(
        &postgres.server,
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'meander'",
    )
    .await;
    wait_for_failure(&runtime, "AuthenticationFailed").await;
    fs::write(&config.source.password_file, "two").unwrap();
    runtime.ready(LIMIT).await;
    execute(&postgres.server, "INSERT INTO t VALUES (-1)").await;
    assert_eq!(wait_for_records(&kafka.client_config(), &topic, 20_002).await, 20_002);
    let log = fs::read_to_string(runtime.process().log()).unwrap();
    assert!(
        !log.contains("'one'") && !log.contains("\"one\"") && !log.contains("\"two\""),
        "{log}"
    );
}
