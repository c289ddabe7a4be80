//! The process: what is started, and how it all ends.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use anyhow::{Context as _, bail};
use clap::Parser;
use futures::FutureExt as _;
use k8s_openapi::api::networking::v1::NetworkPolicyPeer;
use kube::{Api, Client};
use meander_proto::{
    FILE_DESCRIPTOR_SET,
    v1::progress_tracker_server::{self, ProgressTrackerServer},
};
use tokio::{net::TcpListener, task::JoinSet, time::timeout};
use tokio_rustls::TlsAcceptor;
use tokio_stream::{
    StreamExt as _,
    wrappers::{ReceiverStream, TcpListenerStream},
};
use tokio_util::sync::CancellationToken;
use tonic::transport::{Server, Uri};
use tracing::{error, info};

use crate::{
    admin::{self, Readiness},
    cache::{self, Caches, Writers},
    context::{Context, Settings},
    events::Events,
    lease::{Claim, Elector},
    metrics::Metrics,
    pipeline,
    progress::{Authenticator, Pokes, ProgressTrackerService, Tracker},
    replay,
    tls::{self, Keeper, Management, Trust},
};

/// Everything has this long to end.
const GRACE: Duration = Duration::from_secs(20);

/// What the operator is started with.
#[derive(Clone, Debug, Parser)]
#[command(version, about = "The Kubernetes operator of Meander")]
pub struct Options {
    /// Namespace to watch; all of them where it is left out.
    #[arg(long, env = "WATCH_NAMESPACE", value_parser = clap::builder::NonEmptyStringValueParser::new())]
    pub namespace: Option<String>,
    /// Image of runtime pods whose resource names none.
    #[arg(long, env = "RUNTIME_IMAGE")]
    pub runtime_image: String,
    /// Pull policy of runtime pods.
    #[arg(long, env = "RUNTIME_IMAGE_PULL_POLICY", default_value = "IfNotPresent")]
    pub runtime_image_pull_policy: String,
    /// Names of Secrets with credentials for the images of runtime pods, separated by commas; they are looked for beside each pod.
    #[arg(long, env = "RUNTIME_IMAGE_PULL_SECRETS", value_delimiter = ',')]
    pub runtime_image_pull_secrets: Vec<String>,
    /// Where runtime pods reach this operator's gRPC server, such as https://meander-operator.meander.svc:50051. With http:// nothing is
    /// encrypted, which is for local use.
    #[arg(long, env = "PROGRESS_ENDPOINT")]
    pub progress_endpoint: Uri,
    /// Secret with the certificate of the gRPC server, in the namespace of the lease.
    #[arg(long, env = "TLS_SECRET", default_value = "meander-operator-tls")]
    pub tls_secret: String,
    /// Who makes that certificate.
    #[arg(long, env = "TLS_MANAGEMENT", value_enum, default_value = "managed")]
    pub tls_management: Management,
    /// Who may read health and metrics of runtime pods: a JSON list of the peers of a NetworkPolicy. Each pipeline and replay then has a
    /// NetworkPolicy, and none where this is left out.
    #[arg(long, env = "METRICS_FROM", value_parser = peers)]
    pub metrics_from: Option<Peers>,
    /// Namespace of the lease.
    #[arg(long, env = "LEASE_NAMESPACE")]
    pub lease_namespace: String,
    /// Name of the lease.
    #[arg(long, env = "LEASE_NAME", default_value = "meander-operator")]
    pub lease_name: String,
    /// Name of this process among others, such as its pod's name.
    #[arg(long, env = "POD_NAME")]
    pub identity: String,
    /// Address of the gRPC server.
    #[arg(long, env = "GRPC_ADDRESS", default_value = "0.0.0.0:50051")]
    pub grpc_address: SocketAddr,
    /// Address of /livez, /readyz and /metrics.
    #[arg(long, env = "ADMIN_ADDRESS", default_value = "0.0.0.0:9464")]
    pub admin_address: SocketAddr,
}

/// A list as one value: clap takes a `Vec` for one that may be given several times.
#[derive(Clone, Debug)]
pub struct Peers(Vec<NetworkPolicyPeer>);

fn peers(text: &str) -> serde_json::Result<Peers> {
    serde_json::from_str(text).map(Peers)
}

/// Runs until `shutdown`, or until a part of it fails.
///
/// # Errors
/// When something cannot be started, fails, or does not end in time; and when the lease is lost.
pub async fn run(options: Options, client: Client, shutdown: CancellationToken) -> anyhow::Result<()> {
    let metrics = Arc::new(Metrics::new()?);
    let (tracker, pokes) = Tracker::new();
    let tracker = Arc::new(tracker);
    let identity = options.identity.clone();
    let (elector, claim) = Elector::new(client.clone(), &options.lease_namespace, &options.lease_name, &identity);
    let (keeper, acceptor, trust) = secure(&options, client.clone(), claim.clone())?;
    let readiness = Readiness::new(trust.clone());
    let settings = Settings {
        namespace: options.namespace.clone(),
        runtime_image: options.runtime_image.clone(),
        runtime_image_pull_policy: options.runtime_image_pull_policy.clone(),
        runtime_image_pull_secrets: options.runtime_image_pull_secrets.clone(),
        // A Uri ends its path with a slash where the text had none.
        progress_endpoint: options.progress_endpoint.to_string().trim_end_matches('/').to_owned(),
        trust,
        metrics_from: options.metrics_from.clone().map(|Peers(peers)| peers),
        tracing: meander_traces::passed_on(),
    };
    let events = Events::new(client.clone(), &identity);
    let (caches, writers) = Caches::new();
    let context = Arc::new(Context::new(
        client.clone(),
        settings,
        tracker,
        claim.clone(),
        events,
        metrics.clone(),
        Arc::new(caches),
    ));
    let service = ProgressTrackerService {
        context: context.clone(),
        authenticator: Authenticator::new(client.clone()),
        shutdown: shutdown.clone(),
    };
    let grpc = bind(options.grpc_address).await?;
    let admin = bind(options.admin_address).await?;

    let mut parts = JoinSet::new();
    parts.spawn(admin::serve(admin, readiness.clone(), metrics.clone(), shutdown.clone()).map(|r| ("admin", r)));
    parts.spawn(serve_grpc(grpc, service, acceptor, shutdown.clone()).map(|r| ("grpc", r)));
    if let Some(keeper) = keeper {
        metrics.register(keeper.ends())?;
        parts.spawn(keeper.run(shutdown.clone()).map(|()| ("certificate", Ok(()))));
    }
    // The lease is kept until nothing writes any more: it has an end of its own.
    let release = CancellationToken::new();
    let election = tokio::spawn(elector.run(release.clone()).inspect({
        let shutdown = shutdown.clone();
        move |_| shutdown.cancel()
    }));
    parts.spawn(
        control(context, writers, claim, pokes, readiness, metrics, shutdown.clone()).map(|()| ("controllers", Ok(()))),
    );

    shutdown.cancelled().await;
    info!("ending");
    let mut failure = None;
    let all = async {
        while let Some(part) = parts.join_next().await {
            let (name, result) = part.context("a task panicked")?;
            if let Err(cause) = result {
                error!(part = name, error = %cause, "failed");
                failure.get_or_insert(cause.context(name));
            }
        }
        anyhow::Ok(())
    };
    timeout(GRACE, all).await.context("not everything ended in time")??;
    release.cancel();
    timeout(GRACE, election)
        .await
        .context("the election did not end in time")???;
    let leases = Api::namespaced(client, &options.lease_namespace);
    timeout(GRACE, Elector::release(leases, &options.lease_name, &identity))
        .await
        .context("the lease could not be given back in time")??;
    failure.map_or(Ok(()), Err)
}

async fn bind(address: SocketAddr) -> anyhow::Result<TcpListener> {
    TcpListener::bind(address)
        .await
        .with_context(|| format!("listening on {address}"))
}

/// Waits for the lease, then runs both controllers.
async fn control(
    context: Arc<Context>,
    writers: Writers,
    mut claim: Claim,
    pokes: Pokes,
    readiness: Readiness,
    metrics: Arc<Metrics>,
    shutdown: CancellationToken,
) {
    // One that stands by is ready to take over.
    readiness.set(true);
    if shutdown.run_until_cancelled(claim.held()).await.is_none() {
        return;
    }
    metrics.leader.set(1);
    readiness.set(false);
    // Without a certificate, no pod could be told whom to trust.
    let mut trust = context.settings.trust.clone();
    if shutdown.run_until_cancelled(trust.settled()).await.is_none() {
        return;
    }
    let (changes, changed) = cache::changes();
    let [objects_known, pipelines_known, replays_known] = [(); 3].map(|()| CancellationToken::new());
    let objects = context.caches.follow(
        context.client.clone(),
        context.settings.namespace.as_deref(),
        changes,
        || objects_known.cancel(),
        shutdown.clone(),
    );
    // A picture with holes in it looks like one of things that are missing.
    let controllers = async {
        if shutdown.run_until_cancelled(objects_known.cancelled()).await.is_none() {
            return;
        }
        let pipelines = {
            let known = pipelines_known.clone();
            let triggers = ReceiverStream::new(pokes.pipelines).merge(ReceiverStream::new(changed.pipelines));
            pipeline::run(
                context.clone(),
                writers.pipelines,
                triggers,
                shutdown.clone(),
                move || known.cancel(),
            )
        };
        let replays = async {
            let known = replays_known.clone();
            let triggers = ReceiverStream::new(pokes.replays).merge(ReceiverStream::new(changed.replays));
            // They look for their pipelines.
            if shutdown
                .run_until_cancelled(pipelines_known.cancelled())
                .await
                .is_some()
            {
                replay::run(
                    context.clone(),
                    writers.replays,
                    triggers,
                    shutdown.clone(),
                    move || known.cancel(),
                )
                .await;
            }
        };
        futures::join!(Box::pin(pipelines), Box::pin(replays));
    };
    let ready = shutdown.run_until_cancelled(async {
        pipelines_known.cancelled().await;
        replays_known.cancelled().await;
        info!("every resource is known");
        readiness.set(true);
    });
    futures::join!(Box::pin(objects), Box::pin(controllers), ready);
    readiness.set(false);
    // A controller ends only when it is told to; should one ever end by itself, a restart is better than half an operator.
    shutdown.cancel();
}

/// What the endpoint says is needed to be called there.
fn secure(
    options: &Options,
    client: Client,
    claim: Claim,
) -> anyhow::Result<(Option<Keeper>, Option<TlsAcceptor>, Trust)> {
    let endpoint = &options.progress_endpoint;
    match (endpoint.scheme_str(), endpoint.host()) {
        (Some("http"), Some(_)) => Ok((None, None, Trust::plain())),
        (Some("https"), Some(host)) => {
            let (namespace, secret) = (&options.lease_namespace, &options.tls_secret);
            let (keeper, acceptor, trust) =
                Keeper::new(client, namespace, secret, options.tls_management, host, claim)?;
            Ok((Some(keeper), Some(acceptor), trust))
        }
        _ => bail!("{endpoint} is no https://host:port; set --progress-endpoint to where pods reach the operator"),
    }
}

async fn serve_grpc(
    listener: TcpListener,
    service: ProgressTrackerService,
    acceptor: Option<TlsAcceptor>,
    shutdown: CancellationToken,
) -> anyhow::Result<()> {
    let (health, health_service) = tonic_health::server::health_reporter();
    health
        .set_serving::<ProgressTrackerServer<ProgressTrackerService>>()
        .await;
    let reflection = tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(FILE_DESCRIPTOR_SET)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        // The descriptors know services that others serve.
        .with_service_name(progress_tracker_server::SERVICE_NAME)
        .with_service_name("grpc.health.v1.Health")
        .build_v1()?;
    let server = Server::builder()
        // A pod that vanished without a word is noticed.
        .http2_keepalive_interval(Some(Duration::from_secs(10)))
        .http2_keepalive_timeout(Some(Duration::from_secs(10)))
        .add_service(health_service)
        .add_service(reflection)
        .add_service(ProgressTrackerServer::new(service));
    let ending = shutdown.cancelled_owned();
    match acceptor {
        None => {
            let callers = TcpListenerStream::new(listener);
            server.serve_with_incoming_shutdown(callers, ending).await?;
        }
        Some(acceptor) => {
            let callers = tls::encrypted(listener, acceptor);
            server.serve_with_incoming_shutdown(callers, ending).await?;
        }
    }
    Ok(())
}
